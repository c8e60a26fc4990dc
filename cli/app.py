"""The root command: finds a subcommand by name and imports only the module that holds it."""

from __future__ import annotations

from importlib import import_module

import click

# name, module of this package, help in one line; in the order in which a person needs them.
COMMANDS = (
    ("up", "daemons", "Look after sessions on this machine from now on."),
    ("down", "daemons", "Stop that; sessions stay as they are."),
    ("run", "run", "Start a program as a session, on a terminal of lzy's."),
    ("console", "console", "Connect this terminal to that of a session."),
    ("attach", "attach", "Have a running process looked after."),
    ("detach", "attach", "Look after a session no longer."),
    ("ps", "sessions", "List the sessions."),
    ("top", "top", "Show nodes and sessions as they change."),
    ("hibernate", "sleep", "Write a session into the store and end its process."),
    ("wake", "sleep", "Have a session run again."),
    ("migrate", "migrate", "Move a session to another node."),
    ("nodes", "nodes", "List the nodes, or invite another."),
    ("drain", "nodes", "Have a node's sessions leave it, and take no others."),
    ("enter", "enter", "Run a command on a node of this machine."),
    ("agent", "fleet", "Be a node of a fleet that is elsewhere."),
    ("migrator", "fleet", "Run the migrator of a fleet alone."),
    ("hold", "holding", "Do not doze or hibernate a session for a while."),
    ("release", "holding", "Hold a session no longer."),
    ("limit", "limit", "Hold a session to so much memory."),
    ("why", "sessions", "Tell why a session is, or is not, considered idle."),
    ("signal", "holding", "Send a session's process a signal."),
    ("events", "events", "Tell what happened to sessions."),
    ("timeline", "timeline", "Draw what became of sessions, and why."),
    ("logs", "events", "Show what a woken session prints."),
    ("dump", "dump", "Write a running process into an image, and end it."),
    ("restore", "restore", "Bring a process back from its image."),
    ("doze", "doze", "Have a process give its memory back, and stay."),
    ("rouse", "doze", "Bring all of a dozing process's memory back."),
    ("log", "log", "List the checkpoints of a session, newest first."),
    ("fork", "fork", "Bring a checkpoint back as a second process, beside the first."),
    ("diff", "diff", "Tell which memory changed between two checkpoints."),
    ("images", "images", "List the images in the store, newest first."),
    ("show", "show", "Tell what is in an image and what takes the space."),
    ("verify", "verify", "Read and authenticate every byte of an image."),
    ("rm", "upkeep", "Remove images."),
    ("forget", "forget", "Thin out a session's checkpoints."),
    ("gc", "upkeep", "Give back the space of removed images."),
    ("pager", "pager", "See to the pagers of lazily restored processes."),
    ("simulate", "simulate", "Tell what lzy would save, by weeks of sessions replayed."),
    ("doctor", "doctor", "Tell what this machine can do, and what to do about the rest."),
    ("completion", "completion", "Print the script that makes tab complete lzy's commands."),
)


class CommandsByName(click.Group):
    """A group whose commands stay unimported until one is called by its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, _, _ in COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for name, module, _ in COMMANDS:
            if name == cmd_name:
                command = getattr(import_module(f".{module}", __package__), name)
                assert isinstance(command, click.Command)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, _, words in COMMANDS])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version  # slow, and seldom asked for

        click.echo(f"lzy {version('lzy')}")
        ctx.exit()


@click.group(
    cls=CommandsByName,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def lzy(ctx: click.Context) -> None:
    """Make a running Python process movable: dump it, let it go, bring it back in a blink.

    \b
    lzy up                  look after sessions on this machine
    lzy attach 4121         the process with pid 4121 is one of them now
    lzy ps                  how they are; idle ones doze, and later hibernate
    lzy wake analysis       it goes on where it was

    \b
    lzy dump 4121           by hand: the process into an image; it ends
    lzy restore             the latest image; the process goes on where it was
    lzy images              what there is
    lzy doctor              whether this machine can do all that

    Images live in $LZY_HOME/store unless --store names another folder. Every command has --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
