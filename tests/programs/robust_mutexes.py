"""Robust and process-shared mutexes: whose owner dies after the move is still told to its heirs."""

import ctypes
import errno
import functools
import threading
import time

from clib import call, libc
from dialogue import PATIENCE_S, Proof, converse, ends

OWNER_DIED = errno.EOWNERDEAD


def make_mutex() -> ctypes.Array:
    attributes, mutex = ctypes.create_string_buffer(8), ctypes.create_string_buffer(64)
    call("pthread_mutexattr_init", attributes)
    call("pthread_mutexattr_setrobust", attributes, 1)
    call("pthread_mutexattr_setpshared", attributes, 1)
    call("pthread_mutex_init", mutex, attributes)
    return mutex


def main() -> None:
    mutexes = [make_mutex() for _ in range(3)]
    held, die = threading.Event(), threading.Event()

    def own() -> None:
        for mutex in mutexes[:2]:
            libc.pthread_mutex_lock(mutex)
        held.set()
        die.wait()  # …and ends without unlocking.

    owner = threading.Thread(target=own)
    owner.start()
    held.wait()
    inherited: list[int] = []
    heir_waits = threading.Event()

    def inherit() -> None:
        heir_waits.set()
        inherited.append(libc.pthread_mutex_lock(mutexes[1]))

    heir = threading.Thread(target=inherit, daemon=True)
    heir.start()
    heir_waits.wait(PATIENCE_S)

    @functools.cache
    def prove() -> Proof:
        proof: Proof = {"held": libc.pthread_mutex_trylock(mutexes[0]) == errno.EBUSY}
        proof["heir waits"] = not inherited
        proof["free"] = libc.pthread_mutex_lock(mutexes[2]) == 0
        die.set()
        proof["owner ends"] = ends(owner)
        proof["heir is told"] = ends(heir) and inherited == [OWNER_DIED]
        # Python has done with a thread a moment before the kernel has.
        deadline = time.monotonic() + PATIENCE_S
        while (told := libc.pthread_mutex_trylock(mutexes[0])) == errno.EBUSY:
            assert time.monotonic() < deadline
        proof["trylock is told"] = told == OWNER_DIED
        proof["consistent again"] = libc.pthread_mutex_consistent(mutexes[0]) == 0
        return proof

    converse(prove, lambda: (die.set(), ends(owner), ends(heir)))


main()
