"""Threads that hold and await locks of every kind; each gets its turn, none is lost."""

import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

from dialogue import PATIENCE_S, Proof, converse, ends

lock, rlock, condition = threading.Lock(), threading.RLock(), threading.Condition()
semaphore, barrier = threading.BoundedSemaphore(2), threading.Barrier(4)
event, jobs, results = threading.Event(), queue.Queue[int](), queue.Queue[str]()
full: "queue.Queue[int]" = queue.Queue(maxsize=1)
let_go = threading.Event()
waiting = threading.Semaphore(0)
turn = 0


def holds_rlock_twice() -> None:
    with rlock, rlock:
        waiting.release()
        let_go.wait()
    results.put("held")


def awaits(
    name: str, acquire: Callable[[], Any], release: Callable[[], Any] | None
) -> threading.Thread:
    def run() -> None:
        waiting.release()
        acquire()
        results.put(name)
        if release is not None:
            release()

    return threading.Thread(target=run, name=name)


def await_turn(number: int) -> threading.Thread:
    """Threads of one condition go in the order of their numbers, whoever is woken first."""

    def run() -> None:
        global turn
        with condition:
            waiting.release()
            condition.wait_for(lambda: turn == number)
            results.put(f"turn {number}")
            turn += 1
            condition.notify_all()

    return threading.Thread(target=run)


def consume() -> None:
    waiting.release()
    total = 0
    while (job := jobs.get()) >= 0:
        total += job
    results.put(f"consumed {total}")


def main() -> None:
    lock.acquire()
    semaphore.acquire()
    semaphore.acquire()
    full.put(0)
    holder = threading.Thread(target=holds_rlock_twice)
    holder.start()
    waiting.acquire()
    threads = [
        *[awaits(f"lock {n}", lock.acquire, lock.release) for n in range(5)],
        *[awaits(f"rlock {n}", rlock.acquire, rlock.release) for n in range(3)],
        *[awaits(f"semaphore {n}", semaphore.acquire, semaphore.release) for n in range(4)],
        *[awaits(f"event {n}", event.wait, None) for n in range(3)],
        *[awaits(f"barrier {n}", barrier.wait, None) for n in range(3)],
        *[await_turn(n) for n in range(1, 5)],
        awaits("timed", functools.partial(event.wait, 3600), None),
        awaits("put", lambda: full.put(1), None),
        threading.Thread(target=consume),
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        waiting.acquire()
    for job in range(10):
        jobs.put(job)

    @functools.cache
    def prove() -> Proof:
        proof: Proof = {
            "nobody slipped through": results.empty(),
            "locks held": lock.locked() and not rlock.acquire(blocking=False),
            "semaphore used up": not semaphore.acquire(blocking=False),
            "queue full": full.full(),
            "barrier": barrier.n_waiting == 3,
            "turn": turn == 0,
        }
        lock.release()
        let_go.set()
        semaphore.release()
        semaphore.release()
        event.set()
        barrier.wait(PATIENCE_S)
        with condition:
            globals()["turn"] = 1
            condition.notify_all()
        jobs.put(-1)
        proof["took"] = full.get(timeout=PATIENCE_S) == 0
        proof["all end"] = all(list(map(ends, [holder, *threads])))
        seen = [results.get_nowait() for _ in range(results.qsize())]
        proof["each once"] = len(seen) == len(set(seen)) == len(threads) + 1
        proof["consumed"] = "consumed 45" in seen
        proof["turns"] = [name for name in seen if name.startswith("turn")] == [
            f"turn {n}" for n in range(1, 5)
        ]
        return proof

    converse(prove, lambda: jobs.put(1))


main()
