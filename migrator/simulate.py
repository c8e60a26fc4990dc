"""Simulation: a trace of sessions, replayed through `decide` on rented nodes, event by event.

The rules asked are those that a real migrator asks. They are asked when something can change: when
somebody waits, and, on the grid of looks, when a session's next step may be due. What a look could
not know (when the next cell comes) they are not told.

What is not modelled: cores are never short among sessions that run (they are reserved); dozing and
moving take their time from the session but are begun without queueing at the disk; memory grows
only while it computes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from .facts import (
    DOZING,
    HIBERNATED,
    NEVER_S,
    RUNNING,
    Fleet,
    Requests,
    SessionFacts,
    Verdict,
    share_of,
)
from .idleness import (
    DOZE,
    GIVE_GPU_BACK,
    HIBERNATE,
    doze_time,
    first_reply,
    next_step,
    remember_gap,
    window_of,
)
from .life import Life
from .placement import need_of
from .policy import MIGRATE, WAIT, WAKE, Decision, decide
from .stock import Kind, Stock
from .tally import Tally
from .traces import BUSY, END, START, Event
from .world import Policy, World

IDLE = (Verdict("cells", False, "no cell runs"),)
ACTIVE = (Verdict("cells", True, "a cell runs"),)


class Simulation:
    """One policy's run over one trace: feed it events in order, then `finish`."""

    def __init__(self, policy: Policy, kinds: list[Kind], world: World, days: float) -> None:
        self.policy, self.world = policy, world
        self.settings = policy.settings
        self.stock = Stock(kinds, world.linger_s, world.node_start_s, world.spare_nodes)
        self.tally = Tally(policy.name, days)
        self._sessions: dict[str, Life] = {}
        self._waiting: dict[str, Life] = {}
        self._checks: list[tuple[float, str]] = []
        self._looks = self.settings.sample_s
        figures = self.settings
        soonest_s = min(figures.gpu_back_after_s, figures.doze_after_s, figures.hibernate_after_s)
        self._steps = soonest_s < NEVER_S
        looks_s = self._looks * figures.looks
        self._soonest_s = looks_s if figures.adaptive else max(soonest_s, looks_s)

    def feed(self, events: Iterable[Event]) -> None:
        """Replay `events`, in order. Raises ValueError for those that make no sense."""
        for event in events:
            if self._checks and self._checks[0][0] <= event.at_s:
                self._run_checks(event.at_s)
            if event.kind == BUSY:
                session = self._sessions.get(event.session)
                if session is None:
                    session = self._start(event)
                self._compute(session, event)
            elif event.kind == START:
                if event.session in self._sessions:
                    raise ValueError(f"{event.session} starts twice, at {event.at_s:g} s again")
                self._start(event)
            elif event.kind == END and event.session in self._sessions:
                self._end(self._sessions.pop(event.session), event.at_s)

    def finish(self, now_s: float) -> Tally:
        """Run on to `now_s`, the end of the trace, and close the books."""
        self._run_checks(now_s)
        for session in [*self._sessions.values()]:
            self._end(session, max(now_s, session.mark_s))
        self.stock.settle(now_s)
        self.tally.close(self.stock)
        return self.tally

    def facts(self, now_s: float) -> tuple[SessionFacts, ...]:
        """What agents would tell of all sessions."""
        return tuple(self._facts(session, now_s) for session in self._sessions.values())

    # -- what people do -------------------------------------------------------------------------

    def _start(self, event: Event) -> Life:
        session = self._sessions[event.session] = Life(event)
        session.waiting_since_s = event.at_s
        self.tally.sessions += 1
        self._ask([session], event.at_s)
        return session

    def _compute(self, session: Life, event: Event) -> None:
        now_s = event.at_s
        if session.waiting_since_s is not None:
            session.work.append(event)
            return
        gap_s = now_s - session.busy_until_s
        if session.state == RUNNING:
            self._account(session, now_s)
            if event.gpu <= session.gpus:
                self._pass_gap(session, gap_s, now_s)
                self._run(session, event, now_s, max(session.ready_s - now_s, 0.0))
                return
        if gap_s > 0:
            self._pass_gap(session, gap_s, now_s)
        session.wants_gpus = max(event.gpu, session.gpus)
        session.waiting_since_s = now_s
        session.work.append(event)
        self._ask([session], now_s)

    def _run(self, session: Life, event: Event, asked_s: float, wait_s: float) -> None:
        """The session computes `event`, as soon as it has computed what came before."""
        begin_s = max(asked_s + wait_s, session.busy_until_s)
        self.tally.add_wait(wait_s)
        end_s = begin_s + event.duration_s
        session.busy_until_s = end_s
        session.computed_s += event.duration_s
        if event.gpu:
            if asked_s > session.gpu_busy_until_s and self.settings.adaptive:
                gap_s = asked_s - session.gpu_busy_until_s
                session.story = remember_gap(session.story, gap_s, self.settings, gpu=True)
            session.gpu_busy_until_s = end_s
            self.tally.gpu_computing_s += event.duration_s
        if event.memory_bytes and event.memory_bytes != session.memory_bytes:
            self._resize(session, event.memory_bytes)
        if self._steps:
            self._check_idle(session, end_s)

    def _pass_gap(self, session: Life, gap_s: float, now_s: float) -> None:
        """A pause has ended: it was work if it was short; the windows learn from it."""
        if gap_s <= self.world.pause_s:
            self.tally.use(session.paused)
        session.paused.clear()
        if gap_s > 0 and self.settings.adaptive:
            session.story = remember_gap(session.story, gap_s, self.settings)

    def _end(self, session: Life, now_s: float) -> None:
        self._account(session, now_s)
        self._vacate(session, now_s)
        if session.node:
            self.stock.leave(session.node, now_s)
        self._waiting.pop(session.name, None)
        session.state = "ended"
        self._retry(now_s)

    # -- what the rules do ----------------------------------------------------------------------

    def _ask(self, sessions: list[Life], now_s: float) -> None:
        """Have the rules decide about `sessions`, and do what they say."""
        facts = tuple(self._facts(session, now_s) for session in sessions)
        freed = self._carry_out(self._decide(facts, now_s), now_s)
        if any(session.name in self._waiting for session in sessions):
            # Somebody must wait for room: let the rules see who could make it.
            freed |= self._carry_out(self._decide(self.facts(now_s), now_s), now_s)
        if freed:
            self._retry(now_s)

    def _decide(self, facts: tuple[SessionFacts, ...], now_s: float) -> list[Decision]:
        fleet = Fleet(self.stock.nodes(now_s), facts)
        return decide(fleet, self.settings, now_s, explain=False)

    def _retry(self, now_s: float) -> None:
        """Room has come free: those who wait ask again."""
        if not self._waiting:
            return
        facts = tuple(self._facts(session, now_s) for session in self._waiting.values())
        self._carry_out(self._decide(facts, now_s), now_s)

    def _carry_out(self, decisions: list[Decision], now_s: float) -> bool:
        """Do what was decided; whether that made room somewhere."""
        freed = False
        for decision in decisions:
            session = self._sessions[decision.session]
            self._account(session, now_s)
            if decision.action == WAIT:
                self._wait(session, decision, now_s)
                continue
            done = self.tally.actions
            done[decision.action] = done.get(decision.action, 0) + 1
            freed |= decision.action != WAKE
            if decision.action == WAKE:
                self._wake(session, decision.to, now_s)
            elif decision.action in (MIGRATE, GIVE_GPU_BACK):
                self._migrate(session, decision, now_s)
            elif decision.action == DOZE:
                self._spend(session, now_s, doze_time(self._facts(session, now_s), self.settings))
                self._vacate(session, now_s)
                session.state, session.image_bytes = DOZING, session.memory_bytes
                session.story = session.story._replace(image_bytes=session.image_bytes)
            elif decision.action == HIBERNATE:
                self._hibernate(session, now_s)
        return freed

    def _wait(self, session: Life, decision: Decision, now_s: float) -> None:
        """It waits for room; where there never can be any, it does without."""
        if any(refusal.busy for refusal in decision.refusals):
            self._waiting[session.name] = session
            return
        self.tally.refused += 1
        self._waiting.pop(session.name, None)
        if session.state == RUNNING:  # a GPU was asked for that no node has beside the rest
            session.wants_gpus = session.gpus
            self._resume(session, now_s)
        elif session.wants_gpus:
            session.wants_gpus = 0
            self._ask([session], now_s)
        else:
            session.waiting_since_s = None
            session.work.clear()

    def _wake(self, session: Life, to: str, now_s: float) -> None:
        world, settings = self.world, self.settings
        asleep = session.state == DOZING and session.node == to
        if asleep:
            takes_s = first_reply(session.memory_bytes, settings, dozing=True)
        elif self.policy.kills or not session.computed_s:
            takes_s = world.kernel_start_s + world.rerun_share * session.computed_s
            self.tally.rerun_s += world.rerun_share * session.computed_s
            session.computed_s = 0.0
        else:
            takes_s = first_reply(session.memory_bytes, settings)
        takes_s += settings.gpu_attach_s if session.wants_gpus else 0.0
        self._go(session, to, now_s)
        takes_s += max(self.stock.on[to].ready_s - now_s, 0.0)
        if not asleep:
            session.protected_s = now_s + takes_s + settings.protect_after_wake_s
        self._resume(session, now_s + takes_s)

    def _migrate(self, session: Life, decision: Decision, now_s: float) -> None:
        """Hibernate here, wake there: no faster way has been measured yet."""
        back = decision.action == GIVE_GPU_BACK
        takes_s = session.memory_bytes / self.settings.dump_bytes_per_s + self.settings.wake_s
        takes_s += 0.0 if back else self.settings.gpu_attach_s
        if back:
            session.wants_gpus = 0
        self._spend(session, now_s, takes_s)
        self._vacate(session, now_s)
        self._go(session, decision.to, now_s)
        takes_s += max(self.stock.on[decision.to].ready_s - now_s, 0.0)
        if session.waiting_since_s is not None:
            session.protected_s = now_s + takes_s + self.settings.protect_after_wake_s
            self._resume(session, now_s + takes_s)

    def _hibernate(self, session: Life, now_s: float) -> None:
        if self.policy.kills:
            self.tally.killed += 1
        elif session.state == DOZING:
            self._spend(session, now_s, self.world.hibernate_dozing_s)
        else:
            self._spend(session, now_s, session.memory_bytes / self.settings.dump_bytes_per_s)
        self._vacate(session, now_s)
        self.stock.leave(session.node, now_s)
        session.state, session.node, session.wants_gpus = HIBERNATED, "", 0
        if self.policy.kills:
            session.memory_bytes = session.peak_bytes = 2**28
        session.image_bytes, session.since_s = session.memory_bytes, now_s
        session.story = session.story._replace(image_bytes=session.image_bytes)

    def _resume(self, session: Life, ready_s: float) -> None:
        """From `ready_s` on it computes what has come meanwhile."""
        session.waiting_since_s = None
        self._waiting.pop(session.name, None)
        session.paused.clear()
        session.ready_s = max(session.ready_s, ready_s)
        session.busy_until_s = max(session.busy_until_s, ready_s)
        work, session.work = session.work, []
        for event in work:
            self._run(session, event, event.at_s, max(ready_s - event.at_s, 0.0))
        if not work and self._steps:
            self._check_after(session, ready_s)

    # -- looking at sessions --------------------------------------------------------------------

    def _check_at(self, session: Life, at_s: float) -> None:
        """Look at the session at `at_s`, unless that is to happen sooner anyway."""
        if at_s < session.check_s:
            session.check_s = at_s
            heapq.heappush(self._checks, (at_s, session.name))

    def _check_after(self, session: Life, idle_since_s: float) -> None:
        """Look at it when it may have been idle for long enough."""
        self._check_at(session, self._grid(idle_since_s) + self._soonest_s)

    def _check_idle(self, session: Life, idle_since_s: float) -> None:
        """Look at it when its first window may have passed, if nothing happens after then."""
        if session.gpus:
            self._check_after(session, idle_since_s)
        else:
            due_s = self._grid(idle_since_s) + self._soonest(session)
            self._check_at(session, self._grid(due_s))

    def _run_checks(self, until_s: float) -> None:
        """Everything that is due on the grid of looks up to `until_s`."""
        checks = self._checks
        while checks and checks[0][0] <= until_s:
            now_s = checks[0][0]
            due = []
            while checks and checks[0][0] == now_s:
                session = self._sessions.get(heapq.heappop(checks)[1])
                if session is None or session.check_s != now_s:
                    continue  # it has ended, or is to be looked at at another time
                session.check_s = NEVER_S
                if session.state == HIBERNATED:
                    continue
                if not session.gpus:
                    # The same as below, where that can only say "later", for less.
                    due_s = self._grid(session.busy_until_s) + self._soonest(session)
                    if due_s > now_s:
                        self._check_at(session, max(self._grid(due_s), now_s + self._looks))
                        continue
                step = next_step(self._facts(session, now_s), self.settings, now_s)
                if not step.action:
                    computing_s = max(session.busy_until_s, session.gpu_busy_until_s, now_s)
                    self._check_after(session, computing_s)
                elif step.due_s <= now_s:
                    due.append(session)
                    self._check_at(session, now_s + self._looks)
                elif step.due_s < NEVER_S:
                    self._check_at(session, max(self._grid(step.due_s), now_s + self._looks))
            if due:
                self._ask(due, now_s)

    def _soonest(self, session: Life) -> float:
        """The shortest window of a session without GPU."""
        if not self.settings.adaptive:
            return self._soonest_s
        figures = self.settings
        if session.state != RUNNING or figures.doze_after_s > figures.hibernate_after_s:
            return window_of(HIBERNATE, session.story, figures)
        if session.window_of is not session.story:
            session.window_of = session.story
            session.window_s = window_of(DOZE, session.story, figures)
        return session.window_s

    def _grid(self, at_s: float) -> float:
        """The first look at or after `at_s`."""
        return -(-at_s // self._looks) * self._looks

    def _facts(self, session: Life, now_s: float) -> SessionFacts:
        idle_s = now_s - self._grid(session.busy_until_s)
        gpu_idle_s = now_s - self._grid(session.gpu_busy_until_s)
        return SessionFacts(
            session.name,
            session.user,
            session.state,
            session.node,
            session.since_s,
            session.memory_bytes,
            session.peak_bytes,
            image_bytes=session.image_bytes,
            cpu_share=1.0 if idle_s < 0 else 0.0,
            gpu_count=session.gpus,
            gpu_share=1.0 if gpu_idle_s < 0 else 0.0,
            idle_for_s=max(idle_s, 0.0),
            gpu_idle_for_s=max(gpu_idle_s, 0.0),
            verdicts=IDLE if idle_s >= 0 else ACTIVE,
            protected_until_s=session.protected_s or None,
            waiting_since_s=session.waiting_since_s,
            idle_gaps_s=session.story.idle_gaps_s,
            gpu_gaps_s=session.story.gpu_gaps_s,
            slack=session.story.slack,
            requests=Requests(session.cpu, 0, session.wants_gpus),
        )

    # -- who holds what -------------------------------------------------------------------------

    def _go(self, session: Life, to: str, now_s: float) -> None:
        """Live on `to`, running, and hold a share there."""
        was = session.node
        rented = self.stock.take(to, now_s)
        if was:
            self.stock.leave(was, now_s)
        session.node, session.state, session.since_s = to, RUNNING, now_s
        session.gpus = session.wants_gpus
        session.mark_s = max(session.mark_s, now_s)
        need = need_of(self._facts(session, now_s), self.settings)
        facts = rented.facts
        rented.facts = facts._replace(
            reserved_cpu=facts.reserved_cpu + need.cpu,
            reserved_memory_bytes=facts.reserved_memory_bytes + need.memory_bytes,
            reserved_gpus=facts.reserved_gpus + session.gpus,
        )
        share = share_of(facts, need.cpu, need.memory_bytes, session.gpus)
        session.price = share * facts.price_per_hour

    def _vacate(self, session: Life, now_s: float) -> None:
        """Hold nothing any more."""
        if session.state != RUNNING:
            return
        rented = self.stock.on[session.node]
        need = need_of(self._facts(session, now_s), self.settings)
        facts = rented.facts
        rented.facts = facts._replace(
            reserved_cpu=facts.reserved_cpu - need.cpu,
            reserved_memory_bytes=facts.reserved_memory_bytes - need.memory_bytes,
            reserved_gpus=facts.reserved_gpus - session.gpus,
        )
        session.gpus, session.price = 0, 0.0

    def _resize(self, session: Life, memory_bytes: int) -> None:
        """Its memory is another; what it holds follows the most it has had."""
        session.memory_bytes = memory_bytes
        session.story = session.story._replace(memory_bytes=memory_bytes)
        if memory_bytes <= session.peak_bytes:
            return
        rented, facts = self.stock.on[session.node], self.stock.on[session.node].facts
        before_bytes = int(session.peak_bytes * self.settings.growth)
        session.peak_bytes = memory_bytes
        grown_bytes = int(memory_bytes * self.settings.growth) - before_bytes
        rented.facts = facts._replace(
            reserved_memory_bytes=facts.reserved_memory_bytes + grown_bytes
        )
        need = need_of(self._facts(session, session.mark_s), self.settings)
        share = share_of(facts, need.cpu, need.memory_bytes, session.gpus)
        session.price = share * facts.price_per_hour

    def _account(self, session: Life, now_s: float) -> None:
        """Count what it has held since it was last counted: waking, computing, then pausing."""
        since_s = session.mark_s
        if session.state == RUNNING and now_s > since_s:
            if since_s < session.ready_s:
                until_s = min(session.ready_s, now_s)
                self.tally.hold(since_s, until_s, session.price, session.gpus, False)
                since_s = until_s
            until_s = min(max(session.busy_until_s, since_s), now_s)
            if until_s > since_s:
                self.tally.hold(since_s, until_s, session.price, session.gpus, True)
            if now_s > until_s:
                self.tally.hold(until_s, now_s, session.price, session.gpus, False)
                session.paused.append((until_s, now_s))
        session.mark_s = max(session.mark_s, now_s)

    def _spend(self, session: Life, now_s: float, time_s: float) -> None:
        """Its share is held for `time_s` more while it is written or moved."""
        if session.state == RUNNING and time_s > 0:
            self.tally.hold(now_s, now_s + time_s, session.price, session.gpus, False)
