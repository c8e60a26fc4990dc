"""A pool of worker processes in the midst of its tasks: each waits for a word, then completes.

Argument: fork or spawn (multiprocessing's pools), executor (concurrent.futures), loky (joblib).
"""

import multiprocessing
import os
import sys
from typing import Any

from dialogue import PATIENCE_S, Proof, converse
from tasks import square, take, work

WORKERS, TASKS = 2, range(1000, 1007)


def main(kind: str) -> None:
    # What the spawned are given has a name in /dev/shm, by which tests find what is to be removed.
    multiprocessing.current_process()._config["semprefix"] = f"/lzy-test-{os.getpid()}"
    expected = [sum(i * i for i in range(number)) + 40 for number in TASKS]
    if kind == "loky":
        from joblib.externals.loky import ProcessPoolExecutor
        from joblib.externals.loky.backend import get_context

        context = get_context("loky")
    else:
        context = multiprocessing.get_context("spawn" if kind == "spawn" else "fork")
    shared = context.Semaphore(0), context.Event(), context.Semaphore(40)
    begun, go, constant = shared
    if kind in ("fork", "spawn"):
        pool = context.Pool(WORKERS, take, shared)
        pending = pool.map_async(work, TASKS, chunksize=1)
        workers = [process.pid for process in pool._pool]

        def results() -> Any:
            return pending.get(PATIENCE_S)

        def more() -> Any:
            return pool.map_async(square, range(20)).get(PATIENCE_S)

    else:
        if kind == "executor":
            from concurrent.futures import ProcessPoolExecutor
        how = {"context": context} if kind == "loky" else {"mp_context": context}
        pool = ProcessPoolExecutor(WORKERS, initializer=take, initargs=shared, **how)
        futures = [pool.submit(work, number) for number in TASKS]
        workers = None

        def results() -> Any:
            return [future.result(PATIENCE_S) for future in futures]

        def more() -> Any:
            return list(pool.map(square, range(20), timeout=PATIENCE_S))

    for _ in range(WORKERS):
        assert begun.acquire(timeout=PATIENCE_S)
    if workers is None:
        workers = list(pool._processes)

    def prove() -> Proof:
        go.set()
        proof = {
            "results": results() == expected,
            "more": more() == [number * number for number in range(20)],
        }
        alive = {process.pid for process in multiprocessing.active_children()}
        if kind == "loky":
            alive = set(pool._processes)
        return {**proof, "the same workers": set(workers) <= alive}

    def spoil() -> None:
        constant.release()

    converse(prove, spoil)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
