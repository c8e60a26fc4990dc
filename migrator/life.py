"""The life of one simulated session."""

from __future__ import annotations

from .facts import HIBERNATED, NEVER_S, RUNNING, SessionFacts
from .traces import Event


class Life:
    """Where it is, what it holds, what it has asked for, and what its pauses have taught."""

    __slots__ = (
        "busy_until_s", "check_s", "computed_s", "cpu", "gpu_busy_until_s", "gpus", "image_bytes",
        "mark_s", "memory_bytes", "name", "node", "paused", "peak_bytes", "price", "protected_s",
        "ready_s", "since_s", "state", "story", "user", "waiting_since_s", "wants_gpus",
        "window_of", "window_s", "work",
    )  # fmt: skip

    def __init__(self, event: Event) -> None:
        self.name, self.user, self.cpu = event.session, event.user, event.cpu
        self.state, self.node = HIBERNATED, ""
        self.ready_s = self.since_s = self.mark_s = self.busy_until_s = self.gpu_busy_until_s = (
            event.at_s
        )
        self.memory_bytes = self.peak_bytes = 2**28
        self.image_bytes = self.gpus = self.wants_gpus = 0
        self.protected_s = 0.0
        self.computed_s = 0.0
        self.waiting_since_s: float | None = None
        self.work: list[Event] = []  # what came while it could not run
        self.price = 0.0  # of its share, by the hour
        self.paused: list[tuple[float, float]] = []  # held since it last computed
        self.check_s = NEVER_S  # when it is looked at next
        self.story = SessionFacts(event.session, event.user, RUNNING)  # its gaps and slack
        self.window_s = 0.0  # its doze window,
        self.window_of: SessionFacts | None = None  # by the past that this is
