"""Memory that processes share: anonymous, named, memfd; with locks, conditions and queues in it."""

import functools
import mmap
import multiprocessing
import os
import threading
from multiprocessing import shared_memory

from dialogue import PATIENCE_S, Proof, converse
from kin import Answer, Child

SIZE = 1 << 20
context = multiprocessing.get_context("fork")
anonymous = mmap.mmap(-1, SIZE)
memfd = os.memfd_create("lzy-test")
os.ftruncate(memfd, SIZE)
mapped = mmap.mmap(memfd, SIZE)
named = shared_memory.SharedMemory(f"lzy-test-{os.getpid()}-named", create=True, size=SIZE)
lock, condition = context.Lock(), context.Condition()
semaphore, counter, turn = context.Semaphore(5), context.Value("q", 0), context.Value("i", 0)
jobs: "multiprocessing.Queue[object]" = context.Queue()
results: "multiprocessing.Queue[object]" = context.Queue()
waiting = context.Semaphore(0)


def be_holder() -> Answer:
    """Holds the lock; two units of the semaphore; puts into the queue."""
    assert lock.acquire()
    assert semaphore.acquire()
    assert semaphore.acquire()
    for number in range(100):
        jobs.put(("job", number, bytes(number * 10)))

    def answer(word: str) -> object:
        if word == "release":
            return lock.release()
        return change(word)

    return answer


def be_waiter() -> Answer:
    """Awaits, in threads, the lock that its sibling holds, and its turn at the condition."""

    def await_lock() -> None:
        waiting.release()
        with lock:
            results.put("lock")

    def await_turn() -> None:
        with condition:
            waiting.release()
            condition.wait_for(lambda: turn.value == 1)
        results.put("turn")

    threads = [threading.Thread(target=run, daemon=True) for run in (await_lock, await_turn)]
    for thread in threads:
        thread.start()
    named_too = shared_memory.SharedMemory(named.name)
    assert bytes(named_too.buf[:9]) == b"from root"
    named_too.buf[9:18] = b"from both"
    return change


def change(word: str) -> str:
    """Write a word where all of the family can read it; what stood there."""
    before = [bytes(part[100:104]) for part in (anonymous, mapped, named.buf)]
    for part in (anonymous, mapped, named.buf):
        part[100:104] = word.encode()
    with counter.get_lock():
        counter.value += 1
    return repr(before)


def main() -> None:
    for part in (anonymous, mapped, named.buf):
        part[: SIZE // 2] = bytes(range(256)) * (SIZE // 512)
        part[100:104] = b"zero"
    named.buf[:9] = b"from root"
    holder, waiter = Child(be_holder), Child(be_waiter)
    for _ in range(2):
        assert waiting.acquire(timeout=PATIENCE_S)

    @functools.lru_cache(None)
    def finish() -> Proof:
        held = not lock.acquire(timeout=0.01)
        units = [semaphore.acquire(timeout=0.01) for _ in range(4)]
        taken = [jobs.get(timeout=PATIENCE_S) for _ in range(100)]
        holder.ask("release")
        first = results.get(timeout=PATIENCE_S)
        with condition:
            turn.value = 1
            condition.notify_all()
        second = results.get(timeout=PATIENCE_S)
        return {
            "lock is held": held,
            "semaphore": units == [True, True, True, False],
            "queue": taken == [("job", n, bytes(n * 10)) for n in range(100)],
            "lock goes on": first == "lock",
            "condition": second == "turn",
        }

    def prove() -> Proof:
        proof = finish()
        pattern = bytes(range(256)) * (SIZE // 512)
        before, count = bytes(anonymous[100:104]), counter.value
        said = [holder.ask("aaaa"), waiter.ask("bbbb")]
        parts = (anonymous, mapped, named.buf)
        return {
            **proof,
            "anonymous": anonymous[200 : SIZE // 2] == pattern[200:],
            "memfd": mapped[200 : SIZE // 2] == pattern[200:],
            "through its descriptor": os.pread(memfd, 4, 100) == b"bbbb",
            "named": bytes(named.buf[200 : SIZE // 2]) == pattern[200:],
            "attached": bytes(named.buf[:18]) == b"from rootfrom both",
            "one after the other": said == [repr([before] * 3), repr([b"aaaa"] * 3)],
            "seen by all": all(bytes(part[100:104]) == b"bbbb" for part in parts),
            "counter": counter.value == count + 2,
        }

    def spoil() -> None:
        mapped[1000] ^= 1

    converse(prove, spoil)
    os._exit(0)


main()
