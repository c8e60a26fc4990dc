"""What a resident limit costs who fits into it, and what dozing again and hibernating cost then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure
from hosting import Command
from increments import Scribe

if TYPE_CHECKING:
    from cases import Bench

HOTSET = Path(__file__).with_name("hotset.py")
MIB = 1 << 20
_PATIENCE_S = 60.0
_SETTLES_S = 6.0  # some looks of the keeper, a second apart: huge pages are put together again


def limit(bench: Bench) -> Iterator[Figure]:
    """A hot set of a fifth, a limit of a half: passes over the hot set, beside those without."""
    size, hot = bench.size(1024), bench.size(192)
    for kind, what in (("arrays", "arrays of 16 MiB"), ("one", "one array")):
        slower = Figure(
            f"limit_{kind}",
            f"passes over {hot // MIB} MiB of {size // MIB} MiB ({what}) under a limit of"
            f" {size // 2 // MIB} MiB ÷ without",
            "times",
            at_most=1.05,
        )
        settling = Figure(f"limit_{kind}_settling", "… while it settles", "times")
        resident = Figure(f"limit_{kind}_resident", "… in RAM afterwards", "B", at_most=size / 2)
        for _ in range(min(bench.repeats, 3)):
            with bench.store() as store, Scribe(size, HOTSET, str(hot), kind) as program:
                program.do("work 20")
                alone = program.do("work 80")
                keeper = subprocess.Popen(
                    [
                        str(Path(sys.executable).with_name("lzy")),
                        *("doze", str(program.pid), "--store", store),
                        *("--limit", str(size // 2), "--json"),
                    ],
                    stdout=subprocess.DEVNULL,
                )
                try:
                    settling.values.append(program.do("work 80") / alone)
                    deadline = time.monotonic() + _PATIENCE_S
                    while program.resident_bytes() > size // 2:
                        program.do("work 10")
                        if time.monotonic() > deadline:
                            raise RuntimeError("it does not come below its limit")
                    until = time.monotonic() + _SETTLES_S
                    while time.monotonic() < until:
                        program.do("work 10")
                    slower.values.append(program.do("work 80") / alone)
                    resident.values.append(program.resident_bytes())
                finally:
                    keeper.send_signal(signal.SIGINT)
                    keeper.wait()
                if program.do("check") != 1e-9:
                    raise RuntimeError("the cold part is not what it was")
        yield from (slower, settling, resident)


def napping(bench: Bench) -> Iterator[Figure]:
    """What dozes is sent to doze again after a little use, and hibernated."""
    size = bench.size(1024)
    name = f"{size // MIB} MiB"
    again = Figure("doze_again", f"dozing again, {name}, after 1 % was written", "s")
    frozen = Figure("doze_again_freeze", "… stands still at the longest", "s")
    stored = Figure("doze_again_bytes", "… bytes stored", "B")
    ended = Figure("hibernate_dozing", "hibernating it then", "s")
    ended_stored = Figure("hibernate_dozing_bytes", "… bytes stored", "B", at_most=4 * MIB)
    for _ in range(min(bench.repeats, 3)):
        with bench.store() as store, Scribe(size) as scribe:
            Command("doze", str(scribe.pid), "--store", store)
            scribe.do(f"write {size // 4096 // 100}")
            report = Command("doze", str(scribe.pid), "--store", store).report
            again.values.append(report["total_s"])
            frozen.values.append(report["freeze_s"])
            stored.values.append(report["stored_bytes"])
            report = Command("dump", str(scribe.pid), "--store", store).report
            ended.values.append(report["total_s"])
            ended_stored.values.append(report["stored_bytes"])
    yield from (again, frozen, stored, ended, ended_stored)


CASES = {"limit": limit, "napping": napping}
