"""The commands that people type: `lzy dump`, `lzy restore` and their kin.

`app` finds a command and loads only its module, so that `lzy restore` does not pay for what the
others need; `edge` is the one place where errors become lines and exit statuses; `layout` draws
figures, tables and bars. One file for each command or close family. docs/cli.md is the reference.
"""


def main() -> None:
    """Run the command line `sys.argv` and end the interpreter with its exit status."""
    from .edge import run

    run()
