"""Clocks, deadlines and measured time: nothing goes back, nothing is lost, nothing fires early."""

import functools
import sched
import threading
import time

from dialogue import Proof, converse, ends

CLOCKS = (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC_RAW, time.CLOCK_REALTIME)


def main() -> None:
    fired: list[tuple[str, float]] = []
    timer = threading.Timer(2.0, lambda: fired.append(("timer", time.monotonic() - began)))
    agenda = sched.scheduler(time.monotonic, time.sleep)
    began = time.monotonic()
    for delay_s in (1.5, 2.5):
        agenda.enter(delay_s, 0, lambda d=delay_s: fired.append((str(d), time.monotonic() - began)))
    scheduling = threading.Thread(target=agenda.run)
    timer.start()
    scheduling.start()
    went_back: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        last = {clock: time.clock_gettime_ns(clock) for clock in CLOCKS}
        while not stop.is_set():
            for clock in CLOCKS:
                now = time.clock_gettime_ns(clock)
                if now < last[clock]:
                    went_back.append(clock)
                last[clock] = now

    watching = threading.Thread(target=watch)
    watching.start()
    start = {clock: time.clock_gettime(clock) for clock in CLOCKS}

    @functools.cache
    def prove() -> Proof:
        passed = [time.clock_gettime(clock) - start[clock] for clock in CLOCKS]
        proof: Proof = {"the same time has passed on all": max(passed) - min(passed) < 0.5}
        proof["all fire"] = ends(timer) and ends(scheduling)
        names = {name for name, _ in fired}
        proof["each once"] = names == {"timer", "1.5", "2.5"} and len(fired) == 3
        proof["not early"] = all(at >= (2.0 if n == "timer" else float(n)) for n, at in fired)
        stop.set()
        proof["watch ends"] = ends(watching)
        proof["went back"] = sorted(set(went_back)) or True
        before = time.process_time(), time.thread_time()
        sum(range(2_000_000))
        proof["processor time"] = time.process_time() > before[0] and time.thread_time() > before[1]
        return proof

    converse(prove, lambda: went_back.append(1))


main()
