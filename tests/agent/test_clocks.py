"""The wall clock is set, by hours, forward and back: holds and windows go on as if not."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import CommandLine, wait_readable
from pair import Pair
from service import Service

from lzy.checkpoint.errors import Busy

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

HOUR_S = 3600.0
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

/* CLOCK_REALTIME of this process is what a file says ahead of the machine's, in seconds. */
static double ahead(void) {
    static volatile double *told;
    if (!told) {
        int file = open(getenv("STEPPED_CLOCK"), O_RDONLY | O_CLOEXEC);
        void *found = mmap(0, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
        told = found == MAP_FAILED ? 0 : found;
    }
    return told ? *told : 0;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        at->tv_sec += (time_t)ahead();
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


class SteppedClock:
    """The wall clock as the processes see it that were started with `environment`."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._path = folder / f"clock{len(list(folder.glob('clock*')))}"
        self._path.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._path)}

    def step(self, ahead_s: float) -> None:
        """Set it to so many seconds ahead of the machine's own."""
        with open(self._path, "r+b") as file:
            file.write(struct.pack("=d", ahead_s))

    def now(self) -> float:
        """What a process sees."""
        said = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time())"],
            env={**os.environ, **self.environment}, capture_output=True, check=True,
        )  # fmt: skip
        return float(said.stdout)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a process see a clock that is set: the kernel has one for the whole machine."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SOURCE)
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", "clock.so", "clock.c", "-ldl"]
    subprocess.run(words, cwd=folder, check=True)
    return folder / "clock.so"


@pytest.fixture
def clock(tmp_path: Path, library: Path) -> SteppedClock:
    made = SteppedClock(tmp_path, library)
    made.step(5 * HOUR_S)
    assert abs(made.now() - time.time() - 5 * HOUR_S) < 60
    made.step(0)
    return made


def test_hold_lasts_as_long_as_it_was_to(
    start: Start, service: Service, clock: SteppedClock
) -> None:
    """Set forward by hours, a held session is not evicted; set back, the hold does not last longer.

    Also for an agent that was started after that. What is shown is by the clock as it is then.
    """
    program = start("memory_pattern", "12").await_ready()
    service.begin(**clock.environment).set()
    service.attach(program)
    service.do("hold", for_s=HOUR_S)
    for ahead_s in (7 * HOUR_S, -30 * HOUR_S, -30 * HOUR_S):
        clock.step(ahead_s)
        session = service.look()
        left_s = session["hold_until_unix_s"] - clock.now()
        assert HOUR_S - 300 < left_s <= HOUR_S, left_s
        assert -1 < clock.now() - session["since_unix_s"] < 300
        with pytest.raises(Busy, match="held"):
            service.do("hibernate", if_idle=True)
        if ahead_s < 0:
            service.kill()
            service.begin(**clock.environment)
    program.prove()


@pytest.mark.slow
def test_daemon_evicts_whatever_the_clock_is_set_to(
    start: Start, lzy: CommandLine, service: Service, clock: SteppedClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Idle sessions hibernate when their window is over: set forward by hours, one that was used a
    moment ago stays; set back, one that has woken is not spared for hours."""
    program = start(command=[sys.executable, "-c", "input()"])
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    lzy.succeed(
        *("up", "--sample-every", "0.2", "--doze-after", "never", "--hibernate-after", "1h"),
        *("--notice", "0", "--after-wake", "1"),
    )
    service.attach(program)
    lzy.succeed("hibernate")
    program.await_end()
    program.adopt(lzy.succeed("wake")["pid"])
    service.wait_until(lambda: service.look()["idle_for_s"] > 1, "it is seen to be idle")
    for ahead_s in (50 * HOUR_S, -50 * HOUR_S):
        clock.step(ahead_s)
        assert not wait_readable([program.pidfd], 1.5)
        why = lzy.succeed("why")["next"]
        assert 0 < why["due_unix_s"] - clock.now() <= HOUR_S
    lzy.succeed("up", "--hibernate-after", "1s")
    program.await_end()
    service.await_state("hibernated")
    clock.step(0)
    program.adopt(lzy.succeed("wake")["pid"])
    clock.step(-9 * HOUR_S)  # right after the wake
    program.await_end()
    lzy.succeed("down")


def test_nodes_of_other_times_move_a_session(
    start: Start, pair: Pair, tmp_path: Path, library: Path
) -> None:
    """Clocks of two nodes are days apart, before their certificates were made: a held session moves
    from one to the other, and is held there for as long as was left."""
    program = start("memory_pattern", "12").await_ready()
    clocks = [SteppedClock(tmp_path, library) for _ in range(2)]
    for clock, ahead_s in zip(clocks, (-90 * HOUR_S, 50 * HOUR_S), strict=True):
        clock.step(ahead_s)
    pair.source.begin(**clocks[0].environment)
    pair.target.begin(**clocks[1].environment)
    pair.begin()
    pair.source.attach(program)
    pair.source.do("hold", for_s=HOUR_S)
    pair.move()
    assert pair.prove(program) == "target"
    left_s = pair.target.look()["hold_until_unix_s"] - clocks[1].now()
    assert HOUR_S - 300 < left_s <= HOUR_S
