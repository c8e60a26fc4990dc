"""`lzy doze` and `lzy rouse`: a process gives its memory back, stays, and takes it again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from .arguments import complete_image, complete_pid, json_option, store_option
from .edge import Interrupted
from .layout import duration, facts, paint, say, say_json, size
from .sizes import Size
from .stores import open_store

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..agent.client import Client
    from ..checkpoint.doze import DozeReport
    from ..checkpoint.store import Store


def _complete_process(
    ctx: click.Context, parameter: click.Parameter, typed: str
) -> list[CompletionItem]:
    return [*complete_pid(ctx, parameter, typed), *complete_image(ctx, parameter, typed)]


def find_process(store: Store, asked: str) -> int:
    """The pid that was meant: itself, or that of the living process of a session."""
    if asked.isdecimal():
        return int(asked)
    from ..checkpoint.errors import LzyError, NotFound
    from ..checkpoint.lineage import list_lineages

    pids = [lineage.pid for lineage in list_lineages(store) if lineage.session == asked]
    if not pids:
        raise NotFound(
            f"no process of session {asked} runs here",
            remedy=f"lzy ps tells where it is; lzy wake {asked}, or lzy restore {asked}",
            session=asked,
        )
    if len(pids) > 1:
        raise LzyError(
            f"session {asked} has several processes here: {', '.join(map(str, pids))}",
            remedy="name one by its pid",
            session=asked,
        )
    return pids[0]


@click.command(
    epilog="""\b
    Examples:
      lzy doze 4121                         its memory goes to the store, it stays
      lzy doze analysis                     the same by its session's name
      lzy doze 4121 --limit 500M            what is cold goes, until no more than that is there
    """
)
@click.argument("process", metavar="PID|NAME", shell_complete=_complete_process)
@store_option
@click.option("--name", metavar="NAME", help="The session's name.  [default: chosen by lzy]")
@click.option(
    "--limit",
    type=Size(),
    help="Keep its anonymous memory below this, by writing out what is cold, until it ends.",
)
@click.option("--once", is_flag=True, help="With --limit: a single time.")
@json_option
def doze(
    process: str, store: str | None, name: str | None, limit: int | None, once: bool, as_json: bool
) -> None:
    """Have a process give its memory back, without going away.

    A checkpoint is taken; then what the image has is dropped from memory and comes back as it is
    touched. The process keeps its pid, threads, descriptors and terminal, and notices nothing but
    that what it has not touched for a while takes a moment.

    With --limit only what is cold goes, again and again as it grows, until it ends or Ctrl-C. A
    session that is looked after is held to that by its agent from then on, as by lzy limit.
    """
    from ..checkpoint import doze as engine
    from ..checkpoint.copies import enter_copy
    from .progress import ProgressLine

    if once and limit is None:
        raise click.UsageError("--once goes with --limit.")
    if store is None and (client := _find_agent(process)):
        if limit is not None:
            _have_limit_kept(process, limit, once, as_json)
            return
        report = _ask_agent(client, process)
        say_json(as_document(report)) if as_json else say(describe(report))
        return
    opened = open_store(store, create=True)
    pid = find_process(opened, process)
    enter_copy(pid)
    if limit is not None:
        _keep_below(pid, opened, limit, name, once, as_json)
        return
    try:
        with ProgressLine() as line:
            report = engine.doze(pid, opened, name=name, progress=line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; process {pid} runs on") from None
    if as_json:
        say_json(as_document(report))
    else:
        say(describe(report))


def _find_agent(process: str) -> Client | None:
    """Who is to do it, and to know of it: an agent that looks after a session of that name."""
    from ..agent.client import Client, NoAgent
    from ..checkpoint.errors import NotFound

    if process.isdecimal():
        return None
    client = Client()
    try:
        client.get(client.session(process))
    except (NoAgent, NotFound):
        return None
    return client


def _have_limit_kept(session: str, limit_bytes: int, once: bool, as_json: bool) -> None:
    """`--limit` of a session that an agent looks after: a standing one."""
    from .limit import describe_limit, set_limit

    if once:
        raise click.UsageError(f"An agent holds {session} to its limit; leave --once out.")
    limited = set_limit(session, limit_bytes)
    if as_json:
        say_json(describe_limit(limited))
    else:
        words = f"its agent keeps {session} below {size(limit_bytes)} from now on"
        say([f"{words}; lzy limit {session} none ends that"])


def _ask_agent(client: Client, process: str) -> DozeReport:
    """Have the agent do it."""
    from ..checkpoint.doze import DozeReport
    from ..checkpoint.errors import Busy
    from .progress import ProgressLine

    try:
        with ProgressLine() as line:
            answer = client.work(client.session(process, "doze"), {}, line.update)
    except KeyboardInterrupt:
        raise Interrupted(f"{process} is still being put to doze; see lzy ps") from None
    if not (told := answer["report"]):
        raise Busy(f"session {process} dozes already", remedy=f"lzy wake {process} ends that")
    return DozeReport(**{name: told[name] for name in DozeReport._fields})


def _keep_below(
    pid: int, store: Store, limit_bytes: int, name: str | None, once: bool, as_json: bool
) -> None:
    """`--limit`: a line for each round as it goes, or one document at the end."""
    from ..checkpoint.doze import resident_bytes
    from ..checkpoint.limit import Round, keep_below
    from .progress import ProgressLine

    resident_bytes(pid)  # raises NotFound
    rounds: list[Round] = []

    def note(done: Round) -> None:
        rounds.append(done)
        if not as_json:
            line.erase()
            say(
                [
                    f"{size(done.resident_before_bytes)} → {size(done.resident_after_bytes)}:"
                    f" {size(done.dropped_bytes)} went, {size(done.stored_bytes)} of them newly"
                    f" stored; {size(done.came_back_bytes)} had come back since the last time"
                ]
            )

    with ProgressLine() as line:
        if not as_json and not once:
            say([f"keeping process {pid} below {size(limit_bytes)}; Ctrl-C ends that, not it"])
        ended = "once"
        try:
            keep_below(
                pid, store, limit_bytes, name=name, once=once, progress=line.update, note=note
            )
            ended = "once" if once else "process"
        except KeyboardInterrupt:
            ended = "interrupt"
    if as_json:
        document = {
            "pid": pid,
            "limit_bytes": limit_bytes,
            "ended_by": ended,
            "rounds": [done._asdict() for done in rounds],
        }
        say_json(document)
    elif not rounds:
        say([f"process {pid} did not have more than {size(limit_bytes)}"])


@click.command(
    epilog="""\b
    Examples:
      lzy rouse 4121                        bring all of its memory back now
      lzy rouse analysis --no-wait          the same, without waiting for it
    """
)
@click.argument("process", metavar="PID|NAME", shell_complete=_complete_process)
@store_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until all of it is there.")
@json_option
def rouse(process: str, store: str | None, wait: bool, as_json: bool) -> None:
    """Bring all of a dozing process's memory back.

    It runs meanwhile: what it touches comes first.
    """
    from ..checkpoint import doze as engine
    from .progress import ProgressLine

    pid = find_process(open_store(store, create=True), process)
    began = time.monotonic()
    before_bytes = engine.resident_bytes(pid)
    try:
        with ProgressLine() as line:
            engine.begin_to_rouse(pid)
            while wait and (missing_bytes := engine.missing_bytes(pid)):
                present_bytes = engine.resident_bytes(pid)
                line.update("rousing", present_bytes, present_bytes + missing_bytes)
                time.sleep(0.01)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the memory of process {pid} still comes in") from None
    document = {
        "pid": pid,
        "resident_before_bytes": before_bytes,
        "resident_after_bytes": engine.resident_bytes(pid),
        "missing_bytes": engine.missing_bytes(pid),
        "total_s": time.monotonic() - began,
    }
    if as_json:
        say_json(document)
        return
    after_bytes = engine.resident_bytes(pid)
    say(
        facts(
            [
                ("process", paint(str(pid), "bold")),
                ("resident", f"{size(before_bytes)} → {size(after_bytes)}"),
                ("took", duration(time.monotonic() - began)),
            ]
        )
    )


def as_document(report: DozeReport) -> dict[str, object]:
    """The report as docs/cli.md specifies it."""
    return {**report._asdict(), "notes": list(report.notes)}


def describe(report: DozeReport) -> list[str]:
    """The report for people."""
    resident = f"{size(report.resident_before_bytes)} → {size(report.resident_after_bytes)}"
    return [
        *facts(
            [
                ("image", paint(report.image, "bold")),
                ("process", f"{report.pid}, which runs on"),
                ("resident", f"{resident}; {size(report.stored_bytes)} newly stored"),
                (
                    "took",
                    f"{duration(report.total_s)}, never frozen longer than"
                    f" {duration(report.freeze_s)}",
                ),
            ]
        ),
        *(f"{paint('note', 'yellow')}: {note}" for note in report.notes),
    ]
