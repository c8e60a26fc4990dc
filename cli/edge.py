"""The edge: runs a command, and turns whatever it raises into clear lines and an exit status.

Exit statuses: 0 done; 1 lzy failed, or the machine is not ready (`lzy doctor`); 2 the command
line is wrong; 3 to 10 by the kind of error (`lzy.checkpoint.errors`); 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NoReturn

from ..checkpoint.errors import KernelError, LzyError

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


class Interrupted(Exception):
    """Somebody pressed Ctrl-C; the message tells what became of the process."""


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run lzy with `arguments` (default: of this process) and exit with the right status."""
    from .quick import parse_restore

    if arguments is None:
        arguments = sys.argv[1:]
    as_json = "--json" in arguments
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a bar in an ASCII locale is no reason to fail
    try:
        if asked := parse_restore(arguments):
            from .restoring import restore_image

            restore_image(**asked)
            status = 0
        else:
            status = _run_click(arguments, as_json)
        sys.stdout.flush()
    except LzyError as error:
        if os.environ.get("LZY_TRACEBACK"):
            raise
        kind = _in_snake_case(type(error).__name__)
        status = _fail(
            error.message, error.remedy, kind, error.exit_status, as_json, facts=error.facts
        )
    except BrokenPipeError:
        # The reader of our output has had enough (`lzy images | head`). Point stdout elsewhere,
        # or the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        # Not foreseen where it was raised, but the system has said what is wrong.
        if os.environ.get("LZY_TRACEBACK"):
            raise
        remedy = "LZY_TRACEBACK=1 shows where lzy met this"
        status = _fail(str(error), remedy, "os_error", KernelError.exit_status, as_json)
    except Interrupted as error:
        status = _fail(str(error), "", "interrupted", INTERRUPTED_STATUS, as_json)
    except KeyboardInterrupt:
        status = _fail("interrupted", "", "interrupted", INTERRUPTED_STATUS, as_json)
    sys.exit(status)


def _open_standard_streams() -> None:
    """Put /dev/null where the caller closed 0, 1 or 2 (`lzy restore >&-`).

    Else `sys.stdout` is None, and the next file opened, the store's lock, gets its number.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number, inheritable=True)
                os.close(opened)
            setattr(sys, name, open(number, mode))  # noqa: SIM115 - it lives as long as we do


def _run_click(arguments: list[str], as_json: bool) -> int:
    """Parse `arguments` with click and run the command that they name."""
    import click

    from .app import lzy

    try:
        return lzy.main(arguments, prog_name="lzy", standalone_mode=False) or 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        remedy = f"{error.ctx.command_path if error.ctx else 'lzy'} --help"
        message = error.format_message().rstrip(".")
        return _fail(message, remedy, "usage", USAGE_STATUS, as_json)
    except click.ClickException as error:
        return _fail(error.format_message(), "", "error", 1, as_json)


def _fail(
    message: str,
    remedy: str,
    kind: str,
    status: int,
    as_json: bool,
    facts: dict[str, Any] | None = None,
) -> int:
    """Say it on stderr, for programs on stdout too; return `status`."""
    from .layout import paint, say_json

    if as_json:
        error = {
            "kind": kind,
            "message": message,
            "remedy": remedy,
            "exit_status": status,
            "facts": facts or {},
        }
        say_json({"error": error})
    print(f"{paint('lzy: error:', 'red', sys.stderr)} {message}", file=sys.stderr)
    if remedy:
        print(f"{paint('what to do:', 'bold', sys.stderr)} {remedy}", file=sys.stderr)
    return status


def _in_snake_case(name: str) -> str:
    """`StoreUnavailable` to `store_unavailable`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
