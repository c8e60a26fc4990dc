"""Facts: what is known of sessions and nodes at one moment, never changed, in bytes and seconds.

All times of one `Fleet` are of one clock; `now_s` is always handed in beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

RUNNING, DOZING, HIBERNATED = "running", "dozing", "hibernated"
UNSETTLED = frozenset({"waking", "hibernating", "migrating"})
"""States of an operation under way: nothing else is begun before it has ended."""
OVER = frozenset({"ended", "failed"})
WOKE = "it woke a moment ago"
"""A protection for this reason is one from eviction; dozing, which costs little, goes on."""


class Verdict(NamedTuple):
    """What one probe says of a session. A probe that failed or timed out says active."""

    probe: str
    active: bool
    reason: str


class Requests(NamedTuple):
    """What a session asks for; 0 and "" ask for nothing in particular."""

    cpu: float = 0.0
    memory_bytes: int = 0
    gpu: int = 0
    node: str = ""


class Slack(NamedTuple):
    """How far each step is below twice the best cost in hindsight, in seconds (see `idleness`)."""

    gpu_s: float = 0.0
    doze_s: float = 0.0
    hibernate_s: float = 0.0


class SessionFacts(NamedTuple):
    """One session, as its agent tells it."""

    name: str
    owner_uid: int
    state: str
    node: str = ""
    since_s: float = 0.0
    """Since when it has been in this state on this node."""
    memory_bytes: int = 0
    """Resident now; of a sleeping session what it will need again."""
    peak_memory_bytes: int = 0
    memory_limit_bytes: int = 0
    """Where the kernel would kill it (its cgroup's limit); 0: only the node's memory limits it."""
    image_bytes: int = 0
    """What its newest image holds; this much of its memory need not be written again."""
    cpu_share: float = 0.0
    """Cores used over the last sample."""
    gpu_count: int = 0
    gpu_share: float = 0.0
    idle_for_s: float = 0.0
    """For how long every look at it has found every probe idle (`idleness.measure_idleness`)."""
    gpu_idle_for_s: float = 0.0
    verdicts: tuple[Verdict, ...] = ()
    """Those of the newest look."""
    hold_until_s: float | None = None
    protected_until_s: float | None = None
    protected_why: str = WOKE
    waiting_since_s: float | None = None
    """Since when somebody waits for it to run, or to run where its requests are met."""
    idle_gaps_s: tuple[float, ...] = ()
    """Its last gaps that were long enough to be acted upon, oldest first."""
    gpu_gaps_s: tuple[float, ...] = ()
    slack: Slack = Slack()
    requests: Requests = Requests()
    cpu_features: frozenset[str] = frozenset()
    """Those that the process has seen, and may use."""
    files: frozenset[str] = frozenset()
    """Build-ids (or path, size and time) of the files that it has mapped."""


class NodeFacts(NamedTuple):
    """One node, as its agent tells it. What is reserved counts every session that lives there."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: int = 0
    price_per_hour: float = 0.0
    cpu_features: frozenset[str] = frozenset()
    files: frozenset[str] | None = None
    """Files that it has; None: the same as everywhere (one installation for all)."""
    reachable: bool = True
    draining: bool = False
    warm: bool = True
    """False: it has to be started first."""
    reserved_cpu: float = 0.0
    reserved_memory_bytes: int = 0
    reserved_gpus: int = 0
    used_memory_bytes: int = 0
    """Resident memory of everything there, as the kernel counts it."""
    moves: int = 0
    """Operations under way: dozing, hibernating, migrating away."""


class Usage(NamedTuple):
    """What one user's sessions hold in the whole fleet."""

    sessions: int = 0
    cpu: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0


class Fleet(NamedTuple):
    """Everything a decision may depend on.

    `sessions` need not be all: those that are left out are neither looked at nor changed, but are
    counted in their nodes' reservations and in `users`.
    """

    nodes: tuple[NodeFacts, ...]
    sessions: tuple[SessionFacts, ...]
    users: Mapping[int, Usage] = {}


class Settings(NamedTuple):
    """The rules' figures. `per_user` and `per_session` replace single ones by name."""

    gpu_back_after_s: float = 600.0
    doze_after_s: float = 300.0
    hibernate_after_s: float = 1800.0
    adaptive: bool = True
    """Whether windows follow the session's own gaps; else they are the figures above."""

    sample_s: float = 15.0
    """Between two looks at a session."""
    looks: int = 2
    """Looks in a row that must find a session idle before anything is done."""
    protect_after_wake_s: float = 300.0
    backoff_s: float = 60.0
    """After a first failure; doubled by each further one."""
    longest_backoff_s: float = 3600.0

    moves_a_node: int = 2
    """At once, people's wakes not counted: they never wait for these."""
    moves_at_once: int = 16
    pressure_share: float = 0.9
    """Of a node's memory or of a session's limit: above this somebody has to move or doze."""
    relief_share: float = 0.8
    """Nothing is put on a node above this, and relief goes on down to it."""
    growth: float = 1.1
    """Memory reserved for a session, as a multiple of the most it has had."""
    cpu_unasked: float = 1.0
    """Cores reserved for a session that asks for none."""
    settle_s: float = 600.0
    """A session stays this long before it moves for the price alone."""
    saving: float = 0.3
    """By how much cheaper another node must be."""

    user_sessions: int = 0
    """Quotas of one user over the fleet, of what runs; 0: none."""
    user_cpu: float = 0.0
    user_memory_bytes: int = 0
    user_gpus: int = 0

    doze_bytes_per_s: float = 0.75e9
    """Measured, docs/performance.md: 1 GiB of random words in 1.44 s."""
    doze_again_bytes_per_s: float = 1.5e9
    """Measured: 1 GiB that an image has already, in 718 ms."""
    rouse_bytes_per_s: float = 0.65e9
    doze_reply_s: float = 0.1
    """Assumed: first reply of a dozing session, beside what it touches: 770 faults of 130 µs."""
    touched_share: float = 0.1
    """Assumed: of its memory, by the first cell after a wake."""
    long_wait_s: float = 1.5
    """A doze is worth what was set where its wake would keep somebody waiting for this long, and
    in proportion less where they would wait less;"""
    long_gpu_wait_s: float = 20.0
    """the same of giving a GPU back, which is waited for longer, and holds a share much dearer."""
    dump_bytes_per_s: float = 0.86e9
    wake_s: float = 0.35
    """First reply of an idle notebook kernel after `lzy restore` began: 347 ms."""
    gpu_attach_s: float = 3.0
    """Assumed: nothing of it has been measured yet."""

    per_user: Mapping[int, Mapping[str, Any]] = {}
    per_session: Mapping[str, Mapping[str, Any]] = {}


NEVER_S = float("inf")


def settings_of(session: SessionFacts, settings: Settings) -> Settings:
    """The figures that hold for `session`: its own over its user's over everybody's.

    Raises ValueError for a figure that does not exist.
    """
    if not settings.per_user and not settings.per_session:
        return settings
    own = {
        **settings.per_user.get(session.owner_uid, {}),
        **settings.per_session.get(session.name, {}),
    }
    return settings._replace(**own) if own else settings


def share_of(node: NodeFacts, cpu: float, memory_bytes: float, gpus: int) -> float:
    """The share of `node` that so much of it is: the largest of the three (dominant resource)."""
    share = max(cpu / node.cpus, memory_bytes / node.memory_bytes)
    return max(share, gpus / node.gpus) if gpus and node.gpus else share


def is_holding(session: SessionFacts) -> bool:
    """Whether it takes room on its node: it runs, or is on its way to or from that."""
    return session.state == RUNNING or session.state in UNSETTLED
