"""`lzy attach` and `lzy detach`: to look after a running process from now on, or no longer."""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .arguments import complete_pid, json_option
from .durations import Duration
from .layout import facts, paint, say, say_json
from .limit import Limit
from .sessions import choose, name_argument, note_lines

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..checkpoint.errors import LzyError

_STARTERS = ("nsenter", "setsid", "sudo", "env", "timeout", "nohup", "sh", "bash")
_FLAGS = ("-f", "--f", "--connection-file", "--IPKernelApp.connection_file")


def _complete(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    pids = complete_pid(ctx, parameter, typed)
    return pids or [CompletionItem(typed, type="file")]


@click.command(
    epilog="""\b
    Examples:
      lzy attach 4121                       a process by its pid
      lzy attach 4121 --name analysis       under a name of your choice
      lzy attach kernel-3f2a.json           the kernel of a Jupyter connection file
      lzy attach Sales.ipynb                the kernel of an open notebook
      lzy attach 4121 --hibernate-after 2h --doze-after 10m
      lzy attach 4121 --leave-terminal      whose terminal is its own affair
    """
)
@click.argument("process", metavar="PID|FILE", shell_complete=_complete)
@click.option("--name", metavar="NAME", help="The session's name.  [default: chosen by lzy]")
@click.option(
    "--doze-after", type=Duration(never=True), help="Idle this long, it dozes (or: never)."
)
@click.option(
    "--hibernate-after", type=Duration(never=True), help="Idle this long, it is hibernated."
)
@click.option("--limit", type=Limit(), help="Hold it to so much memory, as lzy limit does.")
@click.option(
    "--take-terminal/--leave-terminal",
    default=None,
    help="Have lzy keep its terminal, so that lzy console reaches it; the one it is in goes on "
    "showing it. By default, if it reads from one and that can be done.",
)
@json_option
def attach(
    process: str,
    name: str | None,
    take_terminal: bool | None,
    doze_after: float | None,
    hibernate_after: float | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Have a running process looked after: it becomes a session.

    The process notices nothing. A first checkpoint is taken in the background. When it is idle it
    dozes, later it is hibernated, and `lzy wake` brings it back.
    """
    from ..agent.client import Client

    given = {"doze_after_s": doze_after, "hibernate_after_s": hibernate_after}
    settings = {n: None if v == float("inf") else v for n, v in given.items() if v is not None}
    settings |= {} if limit is None else {"limit_bytes": limit or None}
    if name == "":
        raise click.BadParameter("a session needs a name, or leave --name out.")
    pid = find_process(process)
    found = find_node(pid)
    body: dict[str, Any] = {"pid": pid, "settings": settings, **found}
    body |= {"name": name} if name else {}
    answer: dict[str, Any] | None = None
    notes: list[str] = []
    takes = take_terminal or (take_terminal is None and _reads_terminal(pid, find_home(found)))
    if takes and "pid" in found:
        _attach_there(found, name, settings, take_terminal, as_json)
    if takes:
        from ..checkpoint.errors import AccessDenied, Unsupported
        from .taking import attach_and_take

        try:
            answer = attach_and_take(Client(), pid, body)
        except (Unsupported, AccessDenied) as error:
            if take_terminal:
                raise
            notes = _tell_what_stays(error)
    if answer is None:
        answer = Client().post("/v1/sessions", body, timeout_s=60)
        answer["notes"] += notes
    session = answer["session"]
    if as_json:
        say_json({**session, "notes": answer["notes"]})
        return
    say(
        [
            *facts(
                [
                    ("session", paint(session["name"], "bold")),
                    ("process", f"{session['pid']}, which runs on"),
                ]
            ),
            *note_lines(answer["notes"]),
        ]
    )


@click.command(
    epilog="""\b
    Examples:
      lzy detach analysis                   its process and its images stay
    """
)
@name_argument
@json_option
def detach(name: str | None, as_json: bool) -> None:
    """Look after a session no longer. Its process runs on; its images stay in the store."""
    from ..agent.client import Client

    client = Client()
    session = client.post(client.session(choose(client, name), "detach"))["session"]
    if as_json:
        say_json(session)
    else:
        left = "it has no process"
        if session["pid"]:
            left = f"process {session['pid']} runs on"
        elif session["image"]:
            left = f"lzy restore {session['image']} brings it back"
        say([f"{paint(session['name'], 'bold')} is detached; {left}"])


def _tell_what_stays(error: LzyError) -> list[str]:
    """What it means that a program was not taken from its terminal."""
    notes = [f"it stays in its terminal: {error.facts.get('reason', error.message)}"]
    if companion := error.facts.get("companion"):
        notes.append(
            f"when it hibernates it leaves {companion} alone: a pipe between them ends, and what "
            "it prints into that after its wake goes to a file in logs of LZY_HOME"
        )
        notes.append(error.remedy)
    return notes


def _attach_there(
    found: dict[str, Any],
    name: str | None,
    settings: dict[str, float | None],
    take_terminal: bool | None,
    as_json: bool,
) -> NoReturn:
    """The same on its node of this machine: who shows it in its old terminal is beside it."""
    from .enter import run_on

    words = [str(found["pid"]), *(["--name", name] if name else [])]
    for setting, value in settings.items():
        option, _, unit = setting.rpartition("_")
        shown = {"s": f"{value}s", "bytes": str(value)}[unit]
        none = {"s": "never", "bytes": "none"}[unit]
        words += [f"--{option.replace('_', '-')}", none if value is None else shown]
    words += ["--take-terminal"] * bool(take_terminal) + ["--json"] * as_json
    run_on(found["node"], "attach", *words)


def find_home(found: dict[str, Any]) -> Path | None:
    """The home of the node that `find_node` found, if that is namespaces of this machine."""
    if "pid" not in found:
        return None
    from ..agent.trial import node_home
    from ..checkpoint.home import home

    return node_home(home(), found["node"])


def _reads_terminal(pid: int, folder: Path | None) -> bool:
    """Whether it reads from somebody's terminal, not one that lzy keeps for that home."""
    from ..checkpoint.kept import find_by_device

    try:
        device = os.readlink(f"/proc/{pid}/fd/0")
    except OSError:
        return False
    return device.startswith("/dev/pts/") and not find_by_device(device, folder)


def find_process(asked: str) -> int:
    """The pid that was meant: a number, the kernel of a connection file, or that of a notebook."""
    from ..checkpoint.errors import NotFound

    if asked.isdecimal():
        return int(asked)
    wanted = _kernel_name(asked)
    found = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if wanted(pid)]
    if not found:
        raise NotFound(
            f"no running kernel belongs to {asked}",
            remedy="give its pid: import os; os.getpid() in a cell tells it",
        )
    if len(found) > 1:
        raise click.UsageError(f"{asked} has several kernels: {', '.join(map(str, found))}.")
    return found[0]


def find_node(pid: int) -> dict[str, Any]:
    """Of a fleet: the node that process is on, and its pid there."""
    from ..checkpoint.home import home

    if not (home() / "fleet" / "trial.json").exists():
        if not (home() / "node").exists():
            return {}
        from ..agent.identity import read_identity

        return {"node": read_identity(home()).name}  # other machines' processes: attached there
    from ..agent.network import read_holder
    from ..agent.trial import holder_path, read_trial

    space = os.readlink(f"/proc/{pid}/ns/pid") if os.path.exists(f"/proc/{pid}/ns/pid") else ""
    for name in read_trial(home())["nodes"]:
        first = read_holder(holder_path(home(), name))
        if first and os.readlink(f"/proc/{first}/ns/pid") == space:
            numbers = re.search(r"^NSpid:(.*)$", _read(pid, "status"), re.MULTILINE)
            return {"node": name, "pid": int(numbers[1].split()[-1]) if numbers else pid}
    raise click.UsageError(f"Process {pid} is on no node; lzy enter NODE -- COMMAND starts one.")


def _kernel_name(asked: str) -> Any:
    """A test for pids: whether the process is the kernel that was asked for."""
    path = Path(asked)
    if path.suffix == ".ipynb":
        pattern = rf"(^|\0)JPY_SESSION_NAME=[^\0]*{re.escape(path.name)}(\0|$)"
        return lambda pid: re.search(pattern, _read(pid, "environ"))
    if path.suffix != ".json" or not _is_connection_file(path):
        way = f" pgrep -f {asked} may tell its pid." if path.exists() else ""
        raise click.UsageError(
            f"{asked} is no pid, connection file (.json) or notebook (.ipynb).{way}"
        )

    def is_kernel(pid: int) -> bool:
        words = _read(pid, "cmdline").split("\0")
        if Path(words[0]).name in _STARTERS:  # it has the kernel's whole command among its words
            return False
        given = [after for word, after in pairwise(words) if word in _FLAGS]
        given += [word.partition("=")[2] for word in words if word.partition("=")[0] in _FLAGS]
        if path.exists():
            return any(os.path.realpath(file) == os.path.realpath(path) for file in given)
        return any(Path(file).name == path.name for file in given)

    return is_kernel


def _is_connection_file(path: Path) -> bool:
    if not path.exists():  # its name alone is enough
        return True
    try:
        return "shell_port" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
