"""Whether a session is in use: each probe compares two readings and says so, and why.

A probe that could not look says *active*: what is not known to be idle is in use. A connected
client alone is not activity; what it sends is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..checkpoint.linux.activity import WAITS_FOR_EVENTS, WAITS_FOR_OTHERS
from .readings import Reading
from .settings import Settings


class Verdict(NamedTuple):
    """What one probe thinks, in words for `lzy why`."""

    probe: str
    active: bool
    reason: str


class _Between(NamedTuple):
    """Two readings of a session and the time between them."""

    before: Reading
    now: Reading
    settings: Settings

    @property
    def passed_s(self) -> float:
        return max(self.now.at_s - self.before.at_s, 1e-3)


Probe = Callable[[_Between], "Verdict | None"]


def judge(before: Reading | None, now: Reading, settings: Settings) -> list[Verdict]:
    """The verdict of every probe that has something to say of such a session."""
    if before is None:
        return [Verdict("cpu", True, "looked at for the first time")]
    between = _Between(before, now, settings)
    found = []
    for name, probe in PROBES.items():
        if name in now.errors:
            found.append(Verdict(name, True, f"could not be asked: {now.errors[name]}"))
        elif verdict := probe(between):
            found.append(verdict)
    return found


def cpu_share(before: Reading | None, now: Reading) -> float:
    """CPU of the process and all below it between two readings, in cores."""
    if before is None:
        return 0.0
    return max(0.0, now.cpu_s - before.cpu_s) / max(now.at_s - before.at_s, 1e-3)


def _cpu(between: _Between) -> Verdict:
    share = cpu_share(between.before, between.now)
    limit = between.settings.idle_cpu
    words = f"{share:.1%} of a core over {between.passed_s:.3g} s (idle below {limit:.1%})"
    # The kernel counts in ticks of 10 ms: one of them in a short time is no use of a core.
    ticks = between.now.cpu_s - between.before.cpu_s
    return Verdict("cpu", share >= limit and ticks > 0.011, words)


def _io(between: _Between) -> Verdict:
    moved = between.now.io_bytes - between.before.io_bytes
    return _judge_bytes("io", moved, between, "read and written")


def _sockets(between: _Between) -> Verdict:
    moved = abs(between.now.moved_bytes - between.before.moved_bytes)  # fewer: one was closed
    return _judge_bytes("sockets", moved, between, "through TCP connections")


def _judge_bytes(probe: str, moved: int, between: _Between, what: str) -> Verdict:
    limit = between.settings.idle_bytes_per_s
    rate = max(moved, 0) / between.passed_s
    words = f"{rate:,.0f} B/s {what} (idle below {limit:,.0f})".replace(",", "\u202f")
    return Verdict(probe, rate >= limit and moved >= limit, words)


def _messages(between: _Between) -> Verdict:
    now = between.now
    if now.waiting_connections:
        words = f"{now.waiting_connections} connections wait to be accepted"
        return Verdict("messages", True, words)
    if now.queued_bytes:
        return Verdict("messages", True, f"{now.queued_bytes} bytes wait to be read")
    return Verdict("messages", False, "nothing waits to be read")


def _children(between: _Between) -> Verdict:
    """Workers of a pool that wait for work are no activity: they go and come with their parent."""
    if busy := between.now.busy_children:
        return Verdict("children", True, f"its children are at work: {', '.join(busy)}")
    if children := between.now.children:
        return Verdict("children", False, f"its child processes sleep, all {children}")
    return Verdict("children", False, "no child processes")


def _kernel(between: _Between) -> Verdict | None:
    """A notebook kernel between two cells waits in its event loop, and nowhere else."""
    if not between.now.is_kernel:
        return None
    if between.now.call in WAITS_FOR_EVENTS:
        return Verdict("kernel", False, "the kernel waits for its next cell")
    return Verdict("kernel", True, f"a cell runs ({_describe_call(between.now.call)})")


def _terminal(between: _Between) -> Verdict | None:
    now = between.now
    if now.terminal is None:
        return None
    before = between.before.terminal
    if before and now.terminal.read_unix_s != before.read_unix_s:
        return Verdict("terminal", True, f"somebody types on {now.terminal.path}")
    if now.call not in WAITS_FOR_OTHERS:
        return Verdict("terminal", True, f"does not wait for input: {_describe_call(now.call)}")
    return Verdict("terminal", False, f"waits, and nobody types on {now.terminal.path}")


def _gpu(between: _Between) -> Verdict | None:
    """Whether a GPU that is open computes cannot be told yet, so it counts as in use."""
    if not between.now.has_gpu:
        return None
    return Verdict("gpu", True, "has a GPU open, and lzy cannot tell yet whether it computes")


def _describe_call(call: int | None) -> str:
    return "its main thread computes" if call is None else f"its main thread is in call {call}"


PROBES: Mapping[str, Probe] = {
    "cpu": _cpu,
    "io": _io,
    "sockets": _sockets,
    "messages": _messages,
    "children": _children,
    "kernel": _kernel,
    "terminal": _terminal,
    "gpu": _gpu,
}
