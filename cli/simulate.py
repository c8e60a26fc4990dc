"""`lzy simulate`: weeks of sessions over a described fleet, beside what others do, in a minute."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .arguments import json_option
from .layout import count, duration, paint, say, say_json
from .progress import SHOWN_AFTER_S, ProgressLine

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from click.shell_completion import CompletionItem

    from ..migrator.stock import Kind
    from ..migrator.tally import Tally
    from ..migrator.traces import Event
    from ..migrator.world import Policy, World

_DAY_S = 86400.0
_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": _DAY_S}
_SPANS = ("30s", "1min", "2min", "5min", "10min", "30min", "1h", "never")
_FLEETS = ("small:2cpu:8G:x100:0.08/h", "gpu:4cpu:16G:1gpu:x20:1.01/h")


class Span(click.ParamType[float]):
    """`90`, `90s`, `5min`, `2h` or `never`, as seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        if value == "never":
            return float("inf")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?", value)
        if match is None:
            self.fail(f"{value!r} is no time; 90s, 5min, 2h and never are.", param, ctx)
        return float(match[1]) * _UNITS_S[match[2] or "s"]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(span) for span in _SPANS if span.startswith(incomplete)]


def _complete_fleet(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(fleet) for fleet in _FLEETS if fleet.startswith(typed)]


def _complete_file(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(typed, type="file")]


@click.command(
    epilog="""\b
    Examples:
      lzy simulate                                100 users, a week
      lzy simulate --users 500 --days 28          a month (some minutes of computing)
      lzy simulate --doze-after 1min --svg week.svg
      lzy simulate --fleet small:2cpu:8G:x50:0.08/h,gpu:4cpu:16G:1gpu:x4:1.01/h
      lzy simulate --write-trace week.jsonl       make a trace, and nothing else
      lzy simulate week.jsonl --json | jq '.policies[] | {name, utilisation}'
    """
)
@click.argument("trace", required=False, shell_complete=_complete_file)
@click.option("--users", metavar="N", type=click.IntRange(1, 100_000), help="[default: 100]")
@click.option("--days", metavar="D", type=click.IntRange(1, 3660), help="[default: 7]")
@click.option("--seed", metavar="S", type=int, help="Equal seeds make equal traces.  [default: 1]")
@click.option(
    "--fleet",
    metavar="KINDS",
    shell_complete=_complete_fleet,
    help="Nodes to rent: NAME:2cpu:8G[:1gpu][:xHOW-MANY][:PRICE/h], and further ones after commas.",
)
@click.option("--doze-after", metavar="TIME", type=Span(), help="[default: 5min]")
@click.option("--gpu-back-after", metavar="TIME", type=Span(), help="[default: 10min]")
@click.option("--hibernate-after", metavar="TIME", type=Span(), help="[default: 30min]")
@click.option("--no-adapt", is_flag=True, help="Use these times as they are, for every session.")
@click.option(
    "--timeout", metavar="TIME", type=Span(), default=3600.0, help="Of the policy that kills.  [1h]"
)
@click.option(
    "--pause",
    metavar="TIME",
    type=Span(),
    default=600.0,
    help="Pauses up to this count as work.  [10min]",
)
@click.option("--svg", metavar="FILE", shell_complete=_complete_file, help="Write the picture too.")
@click.option(
    "--write-trace",
    metavar="FILE",
    shell_complete=_complete_file,
    help="Write the made trace there, and simulate nothing.",
)
@json_option
def simulate(
    trace: str | None,
    users: int | None,
    days: int | None,
    seed: int | None,
    fleet: str | None,
    doze_after: float | None,
    gpu_back_after: float | None,
    hibernate_after: float | None,
    no_adapt: bool,
    timeout: float,
    pause: float,
    svg: str | None,
    write_trace: str | None,
    as_json: bool,
) -> None:
    """Replay sessions of a TRACE, or of made users, over a fleet, by the rules that lzy goes by.

    Beside lzy it shows a culler that kills idle kernels, and leaving everything on. `utilisation`
    is the share of the held time in which somebody was at work: a cell ran, or paused for no longer
    than --pause. docs/policy.md tells the rules, the trace's format and what the figures rest upon.
    """
    from ..migrator.facts import Settings
    from ..migrator.world import Policy, World, always_on, fixed_timeout
    from .simulated import as_document, describe

    if trace is not None and not (users is None and days is None and seed is None):
        raise click.UsageError("Give either a TRACE or --users, --days and --seed.")
    if trace is not None and write_trace is not None:
        raise click.UsageError("Give either a TRACE or --write-trace.")
    if trace is None:
        source = Source(None, float(days or 7), users or 100, 1 if seed is None else seed)
    else:
        source = _open_trace(trace)
    if write_trace is not None:
        _write_trace(write_trace, source, as_json)
        return
    kinds = _parse_fleet(fleet)
    given = {
        "doze_after_s": doze_after,
        "gpu_back_after_s": gpu_back_after,
        "hibernate_after_s": hibernate_after,
    }
    figures: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = Settings(**figures, adaptive=not no_adapt)
    policies = [Policy("lzy", settings), fixed_timeout(timeout), always_on()]
    world = World(pause_s=pause)
    began_s = time.monotonic()
    progress = Days()
    with progress:
        tallies = _run(policies, source, kinds, world, progress)
    took_s = time.monotonic() - began_s
    made = f"{count(source.users, 'user')}, {count(round(source.days), 'day')}, seed {source.seed}"
    title = trace or made
    if svg is not None:
        _write_svg(svg, title, tallies)
    if as_json:
        document = {
            "trace": trace,
            "users": None if trace else source.users,
            "seed": None if trace else source.seed,
            "days": source.days,
            "pause_s": pause,
            "policies": [as_document(tally) for tally in tallies],
            "total_s": took_s,
        }
        say_json(document)
        return
    say(describe(title, tallies, world))
    say(["", paint(f"simulated in {duration(took_s)}", "dim")])


class Source(NamedTuple):
    """Where events come from: a file, or the generator."""

    path: str | None
    days: float
    users: int = 0
    seed: int = 0

    def events(self) -> Iterator[Event]:
        """All of them, anew."""
        from ..migrator.traces import make_trace, read_trace

        if self.path is None:
            yield from make_trace(self.users, int(self.days), self.seed)
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            yield from read_trace(file, self.path)


def _write_svg(path: str, title: str, tallies: list[Tally]) -> None:
    from pathlib import Path

    from .plot import write_svg

    drawn = write_svg(
        title,
        [(tally.name, tally.by_hour()) for tally in tallies],
        [(tally.name, tally.held_at_once()) for tally in tallies],
    )
    Path(path).write_text(drawn, encoding="utf-8")


class Days(ProgressLine):
    """The progress line of a simulation: which day it is there."""

    def show_day(self, now_s: float, total_s: float) -> None:
        """Draw that `now_s` of `total_s` have been lived through."""
        from .layout import bar

        elapsed_s = time.monotonic() - self._began_s
        if not self._shown or elapsed_s < SHOWN_AFTER_S or not now_s:
            return
        left_s = elapsed_s * (total_s - now_s) / now_s
        self._draw(
            f"simulating  ▕{bar(now_s, total_s)}▏ day {now_s / _DAY_S:.0f} of "
            f"{total_s / _DAY_S:.0f}  {duration(max(round(left_s), 1))} left"
        )


def _run(
    policies: list[Policy], source: Source, kinds: list[Kind], world: World, progress: Days
) -> list[Tally]:
    """Each policy over the same events: the first here, the others beside it in a process."""
    from multiprocessing import get_context

    from ..checkpoint.errors import LzyError

    first, *others = policies
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    beside = context.Process(
        target=_run_beside, args=(sender, others, source, kinds, world), daemon=True
    )
    beside.start()
    sender.close()
    try:
        ours = _run_one(first, source, kinds, world, progress)
        return [ours, *receiver.recv()]
    except EOFError:
        raise LzyError("the process that simulated the other policies has died") from None
    finally:
        beside.terminate()
        beside.join()


def _run_beside(
    sender: Connection, policies: list[Policy], source: Source, kinds: list[Kind], world: World
) -> None:
    import contextlib
    import signal

    from ..checkpoint.errors import LzyError

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who was interrupted ends us
    with contextlib.suppress(LzyError, OSError):  # who started us meets it as well, and says so
        sender.send([_run_one(policy, source, kinds, world) for policy in policies])


def _run_one(
    policy: Policy, source: Source, kinds: list[Kind], world: World, progress: Days | None = None
) -> Tally:
    from ..migrator.simulate import Simulation

    simulation = Simulation(policy, kinds, world, source.days)
    end_s = source.days * _DAY_S

    def watched() -> Iterator[Event]:
        for number, event in enumerate(source.events()):
            if progress is not None and not number % 1000:
                progress.show_day(event.at_s, end_s)
            yield event

    try:
        simulation.feed(watched())
    except ValueError as error:
        raise _damaged(error) from error
    return simulation.finish(end_s)


def _open_trace(path: str) -> Source:
    """A trace that can be read to its end. Raises NotFound, Damaged."""
    from ..checkpoint.errors import NotFound

    source = Source(path, 0.0)
    last_s = 0.0
    try:
        for event in source.events():
            last_s = max(last_s, event.at_s + event.duration_s)
    except FileNotFoundError:
        raise NotFound(
            f"no trace {path}", remedy=f"lzy simulate --write-trace {path} makes one", path=path
        ) from None
    except ValueError as error:
        raise _damaged(error) from error
    return source._replace(days=max(last_s / _DAY_S, 1 / 24))


def _damaged(error: ValueError) -> Exception:
    from ..checkpoint.errors import Damaged

    return Damaged(str(error), remedy="docs/policy.md describes what a trace is")


def _parse_fleet(text: str | None) -> list[Kind]:
    from ..migrator.stock import DEFAULT_FLEET, parse_fleet

    try:
        return parse_fleet(DEFAULT_FLEET if text is None else text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="--fleet") from error


def _write_trace(path: str, source: Source, as_json: bool) -> None:
    from pathlib import Path

    from ..migrator.traces import write_trace

    events = write_trace(Path(path), source.events())
    if as_json:
        say_json({"trace": path, "events": events, "users": source.users, "days": source.days,
                  "seed": source.seed})  # fmt: skip
    else:
        say([f"{path}: {count(events, 'event')} of {count(source.users, 'user')}"])
