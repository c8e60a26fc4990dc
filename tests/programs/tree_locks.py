"""File locks held by some of a family against the others, and one that is waited for.

Argument: an empty folder.
"""

import fcntl
import functools
import os
import struct
import sys
import threading

from dialogue import PATIENCE_S, Proof, converse
from kin import Answer, Child

F_OFD_SETLK = 37
path = os.path.join(sys.argv[1], "locked")
common = os.open(path, os.O_RDWR | os.O_CREAT)
os.truncate(path, 1000)
flocked = os.open(path + ".flock", os.O_RDWR | os.O_CREAT)
got: "list[float]" = []


def try_lock(descriptor: int, start: int) -> bool:
    """Whether ten bytes there can be locked by us; they are not, afterwards."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, start)
    except BlockingIOError:
        return False
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 10, start)
    return True


def be_child() -> Answer:
    """Holds bytes 100 to 109; awaits those at 0, which its parent holds."""
    fcntl.lockf(common, fcntl.LOCK_EX, 10, 100)

    def wait() -> None:
        waits.set()
        fcntl.lockf(common, fcntl.LOCK_EX, 10, 0)
        got.append(1)

    waits = threading.Event()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    waits.wait()

    def answer(word: str) -> object:
        if word == "got":
            thread.join(PATIENCE_S)
            return bool(got)
        if word == "flock":  # of one description: ours as well as the parent's
            other = os.open(path + ".flock", os.O_RDWR)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return fcntl.flock(flocked, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
            finally:
                os.close(other)
        if word == "ofd":
            return try_lock(common, 200)
        return [try_lock(common, start) for start in (50, 100, 300)]

    return answer


def main() -> None:
    fcntl.lockf(common, fcntl.LOCK_EX, 10, 0)
    fcntl.lockf(common, fcntl.LOCK_SH, 10, 50)
    own = os.open(path, os.O_RDWR)
    fcntl.fcntl(own, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 200, 10, 0))
    fcntl.flock(flocked, fcntl.LOCK_EX)
    child = Child(be_child)

    @functools.lru_cache(None)
    def hand_over() -> Proof:
        early = child.ask("count")
        fcntl.lockf(common, fcntl.LOCK_UN, 10, 0)
        return {
            "child against us": early == "[False, True, True]" or early,
            "it waited for ours": child.ask("got") == "True",
        }

    def prove() -> Proof:
        return {
            "we against the child": not try_lock(common, 0) if got_it() else not held_by_child(),
            **hand_over(),
            "now it has it": not try_lock(common, 0),
            "of a description": child.ask("ofd") == "False",
            "flock of both": child.ask("flock") == "True",
        }

    def got_it() -> bool:
        return hand_over.cache_info().currsize > 0

    def held_by_child() -> bool:
        return try_lock(common, 100)

    converse(prove, lambda: fcntl.lockf(common, fcntl.LOCK_UN, 10, 50))


main()
