"""The edge: runs a command, and turns whatever it raises into clear lines and an exit status.

Exit statuses: 0 done; 1 lzy failed, or the machine is not ready (`lzy doctor`); 2 the command
line is wrong; 3 to 10 by the kind of error (`lzy.checkpoint.errors`); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from ..checkpoint.errors import LzyError
from .layout import paint

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


class Interrupted(Exception):
    """Somebody pressed Ctrl-C; the message tells what became of the process."""


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run lzy with `arguments` (default: of this process) and exit with the right status."""
    from .app import lzy

    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        status = lzy.main(arguments, prog_name="lzy", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.UsageError as error:
        asked = error.ctx.command_path if error.ctx else "lzy"
        status = _fail(
            error.format_message().rstrip("."), f"{asked} --help", "usage", USAGE_STATUS, as_json
        )
    except click.ClickException as error:
        status = _fail(error.format_message(), "", "error", 1, as_json)
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
        status = _fail(str(error), "LZY_TRACEBACK=1 shows where", "os_error", 10, as_json)
    except Interrupted as error:
        status = _fail(str(error), "", "interrupted", INTERRUPTED_STATUS, as_json)
    except (KeyboardInterrupt, click.exceptions.Abort):
        status = _fail("interrupted", "", "interrupted", INTERRUPTED_STATUS, as_json)
    sys.exit(status)


def _fail(
    message: str,
    remedy: str,
    kind: str,
    status: int,
    as_json: bool,
    facts: dict[str, Any] | None = None,
) -> int:
    """Say it on stderr, for programs on stdout too; return `status`."""
    if as_json:
        import json

        error = {
            "kind": kind,
            "message": message,
            "remedy": remedy,
            "exit_status": status,
            "facts": facts or {},
        }
        click.echo(json.dumps({"error": error}, indent=2, default=str))
    lead = paint("lzy: error:", "red", sys.stderr)
    click.echo(f"{lead} {message}", err=True)
    if remedy:
        click.echo(f"{paint('what to do:', 'bold', sys.stderr)} {remedy}", err=True)
    return status


def _in_snake_case(name: str) -> str:
    """`StoreUnavailable` to `store_unavailable`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
