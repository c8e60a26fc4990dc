"""Stacks that grow after the move: the main one downwards by itself, a thread's in its mapping."""

import ctypes
import sys
import threading

from dialogue import Proof, converse, ends

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
DEEP = 2500
sys.setrecursionlimit(50_000)


@CALLBACK
def descend(depth: int) -> int:
    """Go down `depth` frames of the C stack (through libffi) and come back counting."""
    return 1 + (descend(depth - 1) if depth else 0)


def main() -> None:
    reached, deeper, results = threading.Semaphore(0), threading.Event(), list[int]()

    @CALLBACK
    def wait_at_the_bottom(depth: int) -> int:
        if depth:
            return 1 + wait_at_the_bottom(depth - 1)
        reached.release()
        deeper.wait()
        return descend(300)

    threading.stack_size(64 << 20)
    threads = [
        threading.Thread(target=lambda: results.append(wait_at_the_bottom(150))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        reached.acquire()
    threading.stack_size(0)

    def top_of_main_stack() -> int:
        with open("/proc/self/maps") as maps:
            return next(int(line.split("-")[0], 16) for line in maps if "[stack]" in line)

    grown = False

    def prove() -> Proof:
        proof: Proof = {}
        nonlocal grown
        before = top_of_main_stack()
        proof["main"] = descend(DEEP) == DEEP + 1
        proof["main grew"] = grown or before - top_of_main_stack() > 1 << 20
        grown = True
        deeper.set()
        proof["threads end"] = all(list(map(ends, threads)))
        proof["threads"] = results == [150 + 301] * 2
        fresh = threading.Thread(target=lambda: results.append(descend(50)))
        fresh.start()
        proof["a new thread"] = ends(fresh) and results.pop() == 51
        return proof

    converse(prove, lambda: results.append(1))


main()
