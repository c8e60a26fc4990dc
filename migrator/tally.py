"""The tally: what a simulated policy held, used, cost and made people wait.

Definitions, in session-hours, and in money by multiplying with the price of the share held:

held        a node keeps the session's share free for nobody else: it runs, is brought there or
            written away. A dozing or hibernated session holds nothing.
computing   of that, a cell runs
running     computing, and pauses between two cells of at most `World.pause_s`: somebody is at work.
            Of a longer pause nothing counts, not even its first minutes.
utilisation running ÷ held
"""

from __future__ import annotations

from .stock import Stock

HOUR_S = 3600.0
WEEK_H = 168


class Tally:
    """Sums over one run; `close` works out the rest."""

    def __init__(self, name: str, days: float) -> None:
        self.name = name
        self.days = days
        self.sessions = 0
        self.killed = 0
        self.rerun_s = 0.0
        self.refused = 0
        """Requests that no node of the fleet could ever meet."""
        self.held_s = 0.0
        self.computing_s = 0.0
        self.running_s = 0.0
        self.gpu_held_s = 0.0
        self.gpu_computing_s = 0.0
        self.share_cost = 0.0
        self.node_cost = 0.0
        self.node_hours: dict[str, float] = {}
        self.most_nodes: dict[str, int] = {}
        self.bursts = 0
        self.waits_s: list[float] = []
        """Of bursts that had to wait; the others did not."""
        self.actions: dict[str, int] = {}
        self.held_by_hour = [0.0] * WEEK_H
        self.running_by_hour = [0.0] * WEEK_H

    def hold(self, since_s: float, until_s: float, price: float, gpus: int, busy: bool) -> None:
        """A share at `price` an hour was held; `busy`: a cell ran all the while."""
        time_s = until_s - since_s
        self.held_s += time_s
        self.share_cost += time_s * price / HOUR_S
        if gpus:
            self.gpu_held_s += time_s * gpus
        if busy:
            self.computing_s += time_s
            self.running_s += time_s
        hour = int(since_s // HOUR_S)
        if until_s <= (hour + 1) * HOUR_S:
            self.held_by_hour[hour % WEEK_H] += time_s
            if busy:
                self.running_by_hour[hour % WEEK_H] += time_s
            return
        while since_s < until_s:
            stop_s = min(until_s, (hour + 1) * HOUR_S)
            self.held_by_hour[hour % WEEK_H] += stop_s - since_s
            if busy:
                self.running_by_hour[hour % WEEK_H] += stop_s - since_s
            since_s, hour = stop_s, hour + 1

    def use(self, pauses: list[tuple[float, float]]) -> None:
        """Pauses that were held already turn out to have been work."""
        for since_s, until_s in pauses:
            self.running_s += until_s - since_s
            self.running_by_hour[int(since_s // HOUR_S) % WEEK_H] += until_s - since_s

    def add_wait(self, wait_s: float) -> None:
        """A burst began `wait_s` late."""
        self.bursts += 1
        if wait_s > 0:
            self.waits_s.append(wait_s)

    def close(self, stock: Stock) -> None:
        """Take over what the nodes cost; sort the waits."""
        self.node_cost, self.node_hours, self.most_nodes = stock.cost(), stock.hours, stock.most
        self.waits_s.sort()

    def utilisation(self) -> float:
        """Running ÷ held."""
        return self.running_s / self.held_s if self.held_s else 0.0

    def computing_share(self) -> float:
        """Computing ÷ held."""
        return self.computing_s / self.held_s if self.held_s else 0.0

    def gpu_utilisation(self) -> float:
        """GPU computing ÷ GPU held."""
        return self.gpu_computing_s / self.gpu_held_s if self.gpu_held_s else 0.0

    def wait_s(self, quantile: float, *, of_all: bool = False) -> float:
        """The quantile of the waits of those that waited, or of all bursts."""
        count = self.bursts if of_all else len(self.waits_s)
        at = int(quantile * count) - (count - len(self.waits_s))
        return self.waits_s[min(at, len(self.waits_s) - 1)] if at >= 0 and self.waits_s else 0.0

    def held_at_once(self) -> list[float]:
        """Sessions that held a share, on average in each hour of the week."""
        weeks = max(self.days / 7, 1 / WEEK_H)
        return [held_s / HOUR_S / weeks for held_s in self.held_by_hour]

    def by_hour(self) -> list[float | None]:
        """Utilisation in each hour of the week, Monday 00:00 UTC first; None: nothing was held."""
        return [
            running / held if held >= 1.0 else None
            for running, held in zip(self.running_by_hour, self.held_by_hour, strict=True)
        ]
