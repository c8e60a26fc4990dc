"""How long to wait before acting on a pause: never twice as dear as having known its length.

Each gap is a game of ski rental (Karlin, Manasse, Rudolph, Sleator 1988). Holding a share costs a
second per second; a step and the way back cost `break_even_s` seconds of holding, once. Who knew
that a gap lasts g would pay min(g, break_even); who acts after a window w pays g if g ≤ w, else
w + break_even. With w = break_even that is at most twice the best, for every gap, and no other
window promises that for a single one.

Over *many* gaps there is room. Let slack be twice the best so far less what was paid so far; it
begins at 0. With B for break_even_s, a gap g and a window w change it by

    2·min(g, B) - g        ≥ min(0, 2B - w)    if g ≤ w
    2·min(g, B) - (w + B)  ≥ w - B             if g > w and w ≤ B, since then min(g, B) ≥ w
                           = B - w             if g > w and w > B

so every w with |w - B| ≤ slack leaves slack ≥ 0: *at no time have a session's windows cost more
than twice the best in hindsight*. Within these bounds the window is the one that would have cost
least over the session's last gaps. That one's own past predicts better than everybody's average was
found for workstations (Wyckoff, Jeong, Johnson: Finding Idle Work Periods on Networks of
Workstations, NYU TR1998-761) and for serverless functions (Shahrad et al.: Serverless in the Wild,
USENIX ATC 2020).

Three steps (GPU back, doze, hibernate) are three such games over the same gaps: ski rental with
several slopes whose prices add up falls apart into one game for each (Lotker, Patt-Shamir, Rawitz:
Rent, Lease or Buy, STACS 2008), so the bound holds for their sum.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

REMEMBERED_GAPS = 32
"""Gaps a session remembers; the windows follow a change of habits within a day or two."""
LARGEST_SLACK = 4.0
"""In break-evens: a good month must not pay for a bad week."""


def choose_window(gaps_s: tuple[float, ...], slack_s: float, break_even_s: float) -> float:
    """The window from break_even_s - slack_s to break_even_s that would have cost least.

    All in seconds; `gaps_s` are the session's last gaps. Without any it is `break_even_s`; of
    equals the shortest wins. Never longer than `break_even_s`, though the bound would allow it:
    what was set is what people reckon with.
    """
    return _choose(gaps_s, min(slack_s, break_even_s), break_even_s)


@lru_cache(maxsize=8192)  # a session is asked about several times between two of its gaps
def _choose(gaps_s: tuple[float, ...], slack_s: float, break_even_s: float) -> float:
    lowest_s = max(break_even_s - slack_s, 0.0)
    if not gaps_s or lowest_s >= break_even_s:
        return break_even_s
    ordered = sorted(gaps_s)
    paid_s = [0.0, *accumulate(ordered)]
    count = len(ordered)
    # Least cost is at a bound or just at a gap's end: between two of them cost only grows with w.
    first, last = bisect_right(ordered, lowest_s), bisect_right(ordered, break_even_s)
    costs = [(paid_s[first] + (lowest_s + break_even_s) * (count - first), lowest_s)]
    costs += [
        (paid_s[at + 1] + (ordered[at] + break_even_s) * (count - at - 1), ordered[at])
        for at in range(first, last)
    ]
    costs.append((paid_s[last] + 2 * break_even_s * (count - last), break_even_s))
    return min(costs)[1]


def settle_gap(slack_s: float, gap_s: float, window_s: float, break_even_s: float) -> float:
    """The slack after a gap of `gap_s` seconds for which `window_s` had been chosen."""
    best_s = min(gap_s, break_even_s)
    paid_s = gap_s if gap_s <= window_s else window_s + break_even_s
    return min(slack_s + 2 * best_s - paid_s, LARGEST_SLACK * break_even_s)
