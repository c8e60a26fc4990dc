"""What sooner dozing buys and what it costs in waits: `python bench/frontier.py [USERS DAYS]`.

The rules are played over one made trace with windows shorter and longer than those set by default,
adapting and not, in two processes; some minutes for 100 users and 14 days. Prints a line for each,
and writes the picture of docs/performance.md.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lzy.cli import svg
from lzy.migrator.facts import Settings
from lzy.migrator.simulate import Simulation
from lzy.migrator.stock import DEFAULT_FLEET, parse_fleet
from lzy.migrator.traces import make_trace
from lzy.migrator.world import Policy, World

PICTURE = Path(__file__).parent.parent / "docs" / "frontier.svg"
DOZE_S = {True: (120.0, 300.0, 600.0, 1200.0), False: (60.0, 120.0, 300.0)}
INK, GREY, FAINT = "#222", "#666", "#e3e3e3"
COLOURS = {True: "#1b7f5c", False: "#c77d11"}
WORDS = {
    True: "at most so long, in proportion to its wake, by the session's own pauses",
    False: "so long, every session",
}


class Point(NamedTuple):
    """One setting's outcome; waits in seconds, `waited` and `utilisation` as shares."""

    doze_s: float
    is_adaptive: bool
    utilisation: float
    waited: float
    p50_s: float
    p99_s: float
    mean_wait_s: float
    cost: float


def measure(doze_s: float, is_adaptive: bool, users: int, days: int) -> Point:
    """Play the rules with `doze_s`, and with twice that for GPUs."""
    settings = Settings(doze_after_s=doze_s, gpu_back_after_s=2 * doze_s, adaptive=is_adaptive)
    kinds = parse_fleet(DEFAULT_FLEET)
    simulation = Simulation(Policy("lzy", settings), kinds, World(), float(days))
    simulation.feed(make_trace(users, days, 1))
    tally = simulation.finish(days * 86400.0)
    return Point(
        doze_s,
        is_adaptive,
        tally.utilisation(),
        len(tally.waits_s) / tally.bursts,
        tally.wait_s(0.5),
        tally.wait_s(0.99),
        sum(tally.waits_s) / tally.bursts,
        tally.share_cost,
    )


def draw(points: list[Point]) -> str:
    """Utilisation over what a burst of cells waits on average."""
    left, right, top, bottom, low, most_s = 70.0, 720.0, 70.0, 400.0, 0.9, 0.6

    def place(point: Point) -> tuple[float, float]:
        x = left + (right - left) * min(point.mean_wait_s / most_s, 1.0)
        return x, bottom - (bottom - top) * (point.utilisation - low) / (1 - low)

    parts = [
        svg.text(left, 30, "What sooner dozing buys, and what it costs", font_size=16, fill=INK),
        svg.text(left, 54, "utilisation: running ÷ held", fill=GREY),
        svg.text(
            right,
            bottom + 38,
            "wait of a burst of cells, on average of all",
            text_anchor="end",
            fill=GREY,
        ),
    ]
    for percent in range(90, 101, 2):
        y = bottom - (bottom - top) * (percent / 100 - low) / (1 - low)
        parts.append(svg.line([(left, y), (right, y)], stroke=FAINT))
        parts.append(svg.text(left - 8, y + 4, f"{percent} %", text_anchor="end", fill=GREY))
    for tenths in range(7):
        x = left + (right - left) * tenths / (10 * most_s)
        words = f"{100 * tenths} ms"
        parts.append(svg.text(x, bottom + 18, words, text_anchor="middle", fill=GREY))
    wanted = bottom - (bottom - top) * (0.95 - low) / (1 - low)
    parts.append(svg.line([(left, wanted), (right, wanted)], stroke="#a33b3b",
                          stroke_dasharray="4 3"))  # fmt: skip
    parts.append(svg.text(left + 6, wanted - 5, "wanted", fill="#a33b3b"))
    for number, is_adaptive in enumerate((True, False)):
        colour = COLOURS[is_adaptive]
        line = [point for point in points if point.is_adaptive == is_adaptive]
        parts.append(svg.line([place(p) for p in line], stroke=colour, stroke_width=1.5))
        for point in line:
            x, y = place(point)
            size = 6 if is_adaptive and point.doze_s == 300 else 3.5
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>')
            words = f"{point.doze_s / 60:.3g} min: {100 * point.waited:.0f} % wait"
            if is_adaptive:
                x, y = min(x + 6, 620), y + (46 if x > 620 else 28)
                parts.append(svg.text(x, y, words, fill=colour))
            else:
                above = 10 if point.utilisation > 0.95 else -4
                parts.append(svg.text(x - 10, y - above, words, text_anchor="end", fill=colour))
        y = bottom + 62 + 18 * number
        parts.append(svg.line([(left, y - 4), (left + 24, y - 4)], stroke=colour, stroke_width=3))
        parts.append(svg.text(left + 32, y, f"doze after {WORDS[is_adaptive]}", fill=INK))
    return svg.document(760, 500, parts)


def main() -> None:
    users, days = (int(word) for word in sys.argv[1:3]) if sys.argv[2:] else (100, 14)
    wanted = [(doze_s, adaptive) for adaptive, each in DOZE_S.items() for doze_s in each]
    with ProcessPoolExecutor(2) as pool:
        running = [pool.submit(measure, *each, users, days) for each in wanted]
        points = [each.result() for each in running]
    for p in points:
        print(
            f"{p.doze_s / 60:4.3g} min {'adapting' if p.is_adaptive else 'as set  '}"
            f"  utilisation {100 * p.utilisation:.1f} %  waited {100 * p.waited:.1f} %"
            f"  p50 {p.p50_s:.2f} s  p99 {p.p99_s:.1f} s  mean {1000 * p.mean_wait_s:.0f} ms"
            f"  shares cost {p.cost:.0f} $"
        )
    PICTURE.write_text(draw(points))


if __name__ == "__main__":
    main()
