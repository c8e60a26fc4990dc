"""Policy: what to do now with a whole fleet, and why; `decide` is a pure function of its facts.

In this order, because what comes first may take what comes later needs:

1. relief       a node or a session near the end of its memory: doze the idle, move one, before
                the kernel kills
2. requests     a running session that asks for what its node does not give it (a GPU, more memory)
3. waiting      sessions that somebody waits for wake, users who hold least first
4. leaving      a node that is drained: its idle sessions hibernate, others move
5. stepping     idle sessions give their GPU back, move to a cheaper node, doze, hibernate

People's waits go first and are bounded only by room; what merely saves is bounded in number.
Nothing goes to and fro: a session that has moved stays `settle_s` unless it asks, a move for the
price must save `saving`, and who is moved away from pressure finds a node below `relief_share`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .facts import (
    DOZING,
    OVER,
    RUNNING,
    UNSETTLED,
    Fleet,
    NodeFacts,
    SessionFacts,
    Settings,
    Usage,
    settings_of,
)
from .idleness import DOZE, GIVE_GPU_BACK, HIBERNATE, is_idle, is_protected, next_step
from .placement import Need, Placement, Refusal, need_of, place, release, reserve, share_price

WAKE, MIGRATE, WAIT = "wake", "migrate", "wait"
EVICTIONS = frozenset({GIVE_GPU_BACK, DOZE, HIBERNATE})
"""What takes something from a session that did not ask for it."""


class Decision(NamedTuple):
    """One thing to do. WAIT does nothing and tells why a session that is waited for must wait."""

    action: str
    session: str
    node: str
    """Where it is now; "" if nowhere."""
    to: str
    """Where it will be; "" if nowhere."""
    reason: str
    refusals: tuple[Refusal, ...] = ()
    """Of the nodes that were considered and are not `to`: why not."""


def decide(
    fleet: Fleet, settings: Settings, now_s: float, *, explain: bool = True
) -> list[Decision]:
    """What to do now, in order. Deterministic; never more than one decision about a session.

    Without `explain`, refusals are only told where nothing was found: faster, else the same.
    """
    plan = _Plan(fleet, settings, now_s, explain)
    plan.relieve()
    plan.meet_requests()
    plan.wake_waiting()
    plan.leave_drained()
    plan.step_down()
    return plan.decisions


class _Plan:
    """The decisions made so far, and what the fleet will be when they are carried out."""

    def __init__(self, fleet: Fleet, settings: Settings, now_s: float, explain: bool) -> None:
        self.settings, self.now_s, self.explain = settings, now_s, explain
        self.nodes = {node.name: node for node in fleet.nodes}
        self.users = dict(fleet.users)
        self.sessions = sorted(fleet.sessions, key=lambda session: session.name)
        self.decisions: list[Decision] = []
        self._decided: set[str] = set()
        self._moves = sum(node.moves for node in fleet.nodes)

    # -- 1 ------------------------------------------------------------------------------------

    def relieve(self) -> None:
        """Take memory off nodes and sessions that are near their end."""
        settings = self.settings
        share = settings.pressure_share
        full = [n for n in self.nodes.values() if n.used_memory_bytes >= share * n.memory_bytes]
        for node in sorted(full, key=lambda node: node.name):
            used = node.used_memory_bytes / node.memory_bytes
            words = f"{node.name} is {used:.0%} full"
            excess_bytes = int(node.used_memory_bytes - settings.relief_share * node.memory_bytes)
            here = [s for s in self.sessions if s.node == node.name and s.state == RUNNING]
            # What nobody uses first, the longest idle; then the largest, for one move may do.
            here.sort(
                key=lambda s: (not self._may_evict(s), -s.idle_for_s, -s.memory_bytes, s.name)
            )
            for session in here:
                if excess_bytes <= 0:
                    break
                if self._may_evict(session) and not session.gpu_count:
                    self._evict(DOZE, session, f"{words}; it is idle")
                elif not self._move(session, f"{words}; it moves before the kernel kills"):
                    continue
                excess_bytes -= session.memory_bytes
        for session in self.sessions:
            limit_bytes = session.memory_limit_bytes
            if (
                session.state == RUNNING
                and limit_bytes
                and session.memory_bytes >= settings.pressure_share * limit_bytes
            ):
                used = session.memory_bytes / limit_bytes
                words = f"it uses {used:.0%} of its limit"
                self._move(session, words, at_least_bytes=2 * limit_bytes)

    # -- 2 ------------------------------------------------------------------------------------

    def meet_requests(self) -> None:
        """Move running sessions to where what they ask for is."""
        asking = [s for s in self.sessions if s.state == RUNNING and self._asks(s)]
        for session in self._in_fair_order(asking):
            if session.name in self._decided:
                continue
            if session.requests.node not in ("", session.node):
                words = f"{session.requests.node} was asked for"
            elif session.requests.gpu > session.gpu_count:
                words = "a GPU was asked for"
            else:
                words = "more was asked for than its node has"
            self._move(session, words, or_wait=True)

    def _asks(self, session: SessionFacts) -> bool:
        node = self.nodes.get(session.node)
        requests = session.requests
        return node is not None and (
            requests.gpu > session.gpu_count
            or requests.node not in ("", session.node)
            or requests.cpu > node.cpus
            or requests.memory_bytes > node.memory_bytes
        )

    # -- 3 ------------------------------------------------------------------------------------

    def wake_waiting(self) -> None:
        """Wake those that somebody waits for, in fair order; make room where there is none."""
        waiting = [
            s
            for s in self.sessions
            if s.waiting_since_s is not None
            and s.state != RUNNING
            and s.state not in UNSETTLED
            and s.state not in OVER
        ]
        for session in self._in_fair_order(waiting):
            need = need_of(session, self.settings)
            beyond = self._beyond_quota(session, need)
            if beyond:
                self._decide(WAIT, session, "", beyond)
                continue
            found = self._find(session, need)
            if found.node is None:
                self._make_room(session, need, found)
                continue
            here = session.state == DOZING and found.node.name == session.node
            how = "where it dozes" if here else self._praise(found)
            self._settle(session, need, found.node)
            self._decide(
                WAKE, session, found.node.name, f"somebody waits for it; {how}", found.refusals
            )

    def _make_room(self, session: SessionFacts, need: Need, found: Placement) -> None:
        """Have idle sessions doze early, on the node where the fewest suffice."""
        busy = [refusal.node for refusal in found.refusals if refusal.busy]
        best: list[SessionFacts] = []
        idle: dict[str, list[SessionFacts]] = {}
        for other in self.sessions:
            if self._may_evict(other):
                idle.setdefault(other.node, []).append(other)
        for name in busy:
            node, chosen = self.nodes[name], []
            for other in sorted(idle.get(name, []), key=lambda s: (-s.idle_for_s, s.name)):
                node = release(need_of(other, self.settings), node, other)
                chosen.append(other)
                if place(need, (node,), self.settings).node is not None:
                    if not best or len(chosen) < len(best):
                        best = chosen
                    break
        for other in best:
            action = GIVE_GPU_BACK if other.gpu_count else DOZE
            if action == DOZE or self._can_leave_gpu(other):
                self._evict(action, other, f"{session.name} waits for its room, and it is idle")
        why = "no node can take it now" if busy else "no node can ever take it"
        self._decide(WAIT, session, "", f"{why}{'; room is being made' if best else ''}",
                     found.refusals)  # fmt: skip

    # -- 4 ------------------------------------------------------------------------------------

    def leave_drained(self) -> None:
        """Empty nodes that are drained: what is idle hibernates, what runs moves."""
        for session in self.sessions:
            node = self.nodes.get(session.node)
            if node is None or not node.draining or session.name in self._decided:
                continue
            words = f"{node.name} is being drained"
            if session.state == DOZING or (session.state == RUNNING and self._may_evict(session)):
                if not is_protected(session, self.now_s) and self._may_begin(node.name):
                    self._evict(HIBERNATE, session, words)
            elif session.state == RUNNING and self._may_begin(node.name):
                self._move(session, words, or_wait=True)

    # -- 5 ------------------------------------------------------------------------------------

    def step_down(self) -> None:
        """What costs and is not used: GPU first, then size, then memory, then the process."""
        due = []
        for session in self.sessions:
            if session.name in self._decided or session.waiting_since_s is not None:
                continue
            step = next_step(session, self.settings, self.now_s)
            if step.action and step.due_s <= self.now_s:
                due.append((_LADDER[step.action], step.due_s, session.name, session, step))
        for _, _, _, session, step in sorted(due, key=lambda row: row[:3]):
            if not self._may_begin(session.node):
                continue
            if step.action == GIVE_GPU_BACK:
                self._give_gpu_back(session, step.why)
            elif step.action != DOZE or not self._move_to_cheaper(session, step.why):
                self._evict(step.action, session, step.why)

    def _give_gpu_back(self, session: SessionFacts, why: str) -> None:
        """Move it to a node without GPU; if there is no room, and it is idle, hibernate it."""
        without = session._replace(requests=session.requests._replace(gpu=0, node=""))
        need = need_of(without, self.settings)
        found = self._place(need, (n for n in self.nodes.values() if not n.gpus))
        if found.node is not None:
            self._settle(session, need, found.node, gpus=0)
            self._decide(GIVE_GPU_BACK, session, found.node.name, why, found.refusals)
        elif is_idle(session, self.settings):
            self._evict(HIBERNATE, session, f"{why}; no other node has room")

    def _can_leave_gpu(self, session: SessionFacts) -> bool:
        return session.state == RUNNING and session.gpu_share <= 0

    def _move_to_cheaper(self, session: SessionFacts, why: str) -> bool:
        """Instead of dozing where it is dear: on a node that costs `saving` less, it dozes next."""
        own, node = settings_of(session, self.settings), self.nodes.get(session.node)
        if node is None or self.now_s - session.since_s < own.settle_s or session.requests.node:
            return False
        need = need_of(session, self.settings)
        now_price = share_price(need, node)
        affordable = (1 - own.saving) * now_price
        if not now_price or not any(
            share_price(need, kind) <= affordable for kind in self._kinds()
        ):
            return False
        others = (other for other in self.nodes.values() if other.name != node.name)
        found = self._place(need, others)
        if found.node is None:
            return False
        price = share_price(need, found.node)
        if price > affordable:
            return False
        self._settle(session, need, found.node)
        saved = 1 - price / now_price
        self._decide(MIGRATE, session, found.node.name,
                     f"{why}; {found.node.name} is {saved:.0%} cheaper for it",
                     found.refusals)  # fmt: skip
        return True

    # -- what the rules share -------------------------------------------------------------------

    def _move(
        self, session: SessionFacts, words: str, *, at_least_bytes: int = 0, or_wait: bool = False
    ) -> bool:
        """Migrate a running session to the best other node; tell if there is none."""
        if session.name in self._decided:
            return False
        need = need_of(session, self.settings)
        if at_least_bytes > need.memory_bytes:
            need = need._replace(memory_bytes=at_least_bytes)
        beyond = self._beyond_quota(session, need) if need.gpu > session.gpu_count else ""
        others = (node for node in self.nodes.values() if node.name != session.node)
        found = Placement(None, ()) if beyond else self._place(need, others)
        if found.node is None:
            if or_wait:
                refused = beyond or "no other node can take it"
                if not beyond and any(refusal.busy for refusal in found.refusals):
                    self._make_room(session, need, found)
                else:
                    self._decide(WAIT, session, "", f"{words}, but {refused}", found.refusals)
            return False
        self._settle(session, need, found.node)
        self._decide(MIGRATE, session, found.node.name, f"{words}; {self._praise(found)}",
                     found.refusals)  # fmt: skip
        return True

    def _find(self, session: SessionFacts, need: Need) -> Placement:
        """Where it dozes if there is room, for that costs nobody a move; else the best node."""
        home = self.nodes.get(session.node) if session.state == DOZING else None
        if home is not None:
            at_home = self._place(need, (home,))
            if at_home.node is not None:
                return at_home
        return self._place(need, self.nodes.values())

    def _place(self, need: Need, nodes: Iterable[NodeFacts]) -> Placement:
        return place(need, nodes, self.settings, explain=self.explain)

    def _kinds(self) -> Iterable[NodeFacts]:
        """One node of each size and price."""
        return {
            (n.cpus, n.memory_bytes, n.gpus, n.price_per_hour): n for n in self.nodes.values()
        }.values()

    def _may_evict(self, session: SessionFacts) -> bool:
        """Whether something may be taken from it early: idle, and neither held nor protected."""
        return (
            session.name not in self._decided
            and session.state == RUNNING
            and session.waiting_since_s is None
            and not is_protected(session, self.now_s)
            and is_idle(session, settings_of(session, self.settings))
        )

    def _may_begin(self, node: str) -> bool:
        """Whether one more operation that only saves may begin on `node`."""
        here = self.nodes.get(node)
        if here is None or not here.reachable:
            return False
        return self._moves < self.settings.moves_at_once and here.moves < self.settings.moves_a_node

    def _in_fair_order(self, sessions: Iterable[SessionFacts]) -> Iterator[SessionFacts]:
        """Those of users who hold least first, as it is by then; then who has waited longest."""
        left = list(sessions)
        if len(left) < 2:
            yield from left
            return
        all_cpu = sum(node.cpus for node in self.nodes.values()) or 1
        all_bytes = sum(node.memory_bytes for node in self.nodes.values()) or 1
        all_gpus = sum(node.gpus for node in self.nodes.values()) or 1

        def rank(session: SessionFacts) -> tuple[float, float, str]:
            held = self.users.get(session.owner_uid, Usage())
            share = max(held.cpu / all_cpu, held.memory_bytes / all_bytes, held.gpus / all_gpus)
            since_s = session.waiting_since_s
            return share, self.now_s if since_s is None else since_s, session.name

        while left:
            left.remove(first := min(left, key=rank))
            yield first

    def _beyond_quota(self, session: SessionFacts, need: Need) -> str:
        """Why its owner may not have it run now; "" if they may."""
        own = settings_of(session, self.settings)
        held = self.users.get(session.owner_uid, Usage())
        mine = session.state == RUNNING  # counted already, but for what it asks on top
        gpus = held.gpus + need.gpu - (session.gpu_count if mine else 0)
        if own.user_gpus and gpus > own.user_gpus:
            return f"its owner holds {held.gpus} of {own.user_gpus} GPUs"
        if mine:
            return ""
        if own.user_sessions and held.sessions + 1 > own.user_sessions:
            return f"its owner has {held.sessions} of {own.user_sessions} sessions running"
        if own.user_cpu and held.cpu + need.cpu > own.user_cpu:
            return f"its owner holds {held.cpu:g} of {own.user_cpu:g} CPUs"
        if own.user_memory_bytes and held.memory_bytes + need.memory_bytes > own.user_memory_bytes:
            return "its owner's sessions hold all the memory that they may"
        return ""

    def _praise(self, found: Placement) -> str:
        assert found.node is not None
        return f"{found.node.name} is the cheapest that can take it"

    def _evict(self, action: str, session: SessionFacts, reason: str) -> None:
        """Doze or hibernate: its room is free, its node busy with it for a moment."""
        node = self.nodes.get(session.node)
        need = need_of(session, self.settings)
        if action == GIVE_GPU_BACK:
            self._give_gpu_back(session, reason)
            return
        if node is not None:
            self.nodes[node.name] = release(need, node, session)._replace(moves=node.moves + 1)
        self._count(session, need, -1)
        self._moves += 1
        self._decide(action, session, session.node if action == DOZE else "", reason)

    def _settle(
        self, session: SessionFacts, need: Need, to: NodeFacts, gpus: int | None = None
    ) -> None:
        """Take its room where it is, if it has any, and give it room on `to`."""
        was = self.nodes.get(session.node)
        running = session.state == RUNNING
        if running:
            had = need_of(session, self.settings)
            if was is not None:
                self.nodes[was.name] = release(had, was, session)._replace(moves=was.moves + 1)
            self._moves += 1
            self._count(session, had, -1)
        gets = need.gpu if gpus is None else gpus
        self.nodes[to.name] = reserve(need, self.nodes[to.name], gets)
        self._count(session._replace(gpu_count=gets), need, 1)

    def _count(self, session: SessionFacts, need: Need, sign: int) -> None:
        held = self.users.get(session.owner_uid, Usage())
        self.users[session.owner_uid] = Usage(
            held.sessions + sign,
            held.cpu + sign * need.cpu,
            held.memory_bytes + sign * need.memory_bytes,
            held.gpus + sign * session.gpu_count,
        )

    def _decide(
        self,
        action: str,
        session: SessionFacts,
        to: str,
        reason: str,
        refusals: tuple[Refusal, ...] = (),
    ) -> None:
        self._decided.add(session.name)
        self.decisions.append(Decision(action, session.name, session.node, to, reason, refusals))


_LADDER = {GIVE_GPU_BACK: 0, DOZE: 1, HIBERNATE: 2}
