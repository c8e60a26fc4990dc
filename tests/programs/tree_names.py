"""Memory with names in /dev/shm: blocks that spawned processes attach, semaphores they wait for."""

import ctypes
import mmap
import multiprocessing
import os
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

from dialogue import PATIENCE_S, Proof, converse

PAGE = 4096
SIZE = 3 << 20
PREFIX = f"lzy-test-{os.getpid()}-"
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
for name in ("sem_post", "sem_trywait", "sem_getvalue"):
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p][: 1 + (name[4] == "g")]


def open_semaphore(name: str, *create: int) -> int:
    """sem_open(3); `create`: flags, mode and value."""
    found = libc.sem_open(name.encode(), *(create or (0,)))
    assert found, os.strerror(ctypes.get_errno())
    return int(found)


def work(name: str, given: Any, wanted: Any, done: Any, semaphore: str) -> None:
    """In a spawned process: for each word asked, change the block under a lock and tell."""
    block = shared_memory.SharedMemory(name)
    posix = open_semaphore(semaphore)
    done.put((os.getpid(), b"here"))
    while True:
        wanted.acquire()
        word = given.get(timeout=PATIENCE_S)
        before = bytes(block.buf[100:104])
        block.buf[100:104] = word
        libc.sem_post(posix)
        done.put((os.getpid(), before))


def value_of(posix: int) -> int:
    value = ctypes.c_int(-1)
    assert libc.sem_getvalue(posix, ctypes.byref(value)) == 0
    return value.value


def main() -> None:
    multiprocessing.current_process()._config["semprefix"] = f"/{PREFIX}"  # type: ignore[attr-defined]  # nothing public sets it
    context = multiprocessing.get_context("spawn")
    block = shared_memory.SharedMemory(f"{PREFIX}block", create=True, size=SIZE)
    block.buf[: 40 * PAGE] = b"".join(bytes([n % 251 + 1]) * 64 for n in range(40 * PAGE // 64))
    block.buf[SIZE - 3 :] = b"end"  # nothing in between: pages that do not exist
    # By descriptor only; in a folder; mapped after its name was removed, as torch does; privately
    os.makedirs(f"/dev/shm/{PREFIX}folder", exist_ok=True)
    place = Path(f"/dev/shm/{PREFIX}folder/inner")
    inner = os.open(place, os.O_RDWR | os.O_CREAT, 0o640)
    os.write(inner, b"kept in a folder" + bytes(PAGE))
    os.lseek(inner, 5, os.SEEK_SET)
    private = mmap.mmap(inner, PAGE, flags=mmap.MAP_PRIVATE)
    private[:4] = b"mine"
    passing = Path(f"/dev/shm/{PREFIX}passing")
    passing.write_bytes(b"p" * 2 * PAGE)
    with passing.open("r+b") as file:
        nameless = mmap.mmap(file.fileno(), 2 * PAGE)
    passing.unlink()
    semaphore = f"/{PREFIX}posix"
    posix = open_semaphore(semaphore, os.O_CREAT | os.O_EXCL, 0o600, 3)
    wanted, given, done = context.Semaphore(0), context.Queue(), context.Queue()
    rights = (block.name, given, wanted, done, semaphore)
    workers = [context.Process(target=work, args=rights, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
        done.get(timeout=PATIENCE_S)

    def ask(word: bytes) -> Any:
        given.put(word)
        wanted.release()
        return done.get(timeout=PATIENCE_S)

    ask(b"zero")
    expected = bytearray(SIZE)
    expected[: 40 * PAGE] = block.buf[: 40 * PAGE]
    expected[SIZE - 3 :] = b"end"
    count = value_of(posix)

    def prove() -> Proof:
        nonlocal count
        last = bytes(block.buf[100:104])
        told = [ask(b"aaaa"), ask(b"bbbb")]
        count += 2
        expected[100:104] = b"bbbb"
        content = Path(f"/dev/shm/{block.name}").read_bytes()  # to touch a hole would fill it
        again = shared_memory.SharedMemory(block.name)
        other = open_semaphore(semaphore)
        third = context.Process(target=work, args=rights, daemon=True)
        third.start()  # it finds all of it by name
        workers.append(third)
        late = [done.get(timeout=PATIENCE_S)]
        late += [ask(word) for word in (b"cccc", b"dddd", b"eeee", b"bbbb")]
        count += 4
        return {
            "content": content == expected and block.buf[: 40 * PAGE] == expected[: 40 * PAGE],
            "by its name": again.buf[: 40 * PAGE] == expected[: 40 * PAGE],
            "no more pages": os.stat(f"/dev/shm/{block.name}").st_blocks * 512 <= 64 * PAGE,
            "asked": [before for _, before in told] == [last, b"aaaa"],
            "workers": {pid for pid, _ in told + late} <= {worker.pid for worker in workers},
            "asked once more": [b for _, b in late]
            == [b"here", b"bbbb", b"cccc", b"dddd", b"eeee"],
            "semaphore": value_of(posix) == count,
            "semaphore by its name": value_of(other) == count,
            "position": os.lseek(inner, 0, os.SEEK_CUR) == 5,
            "folder": place.read_bytes() == b"kept in a folder" + bytes(PAGE),
            "rights": os.stat(place).st_mode & 0o777 == 0o640,
            "private": private[:16] == b"mine" + b"kept in a folder"[4:],
            "nameless": nameless[:] == b"p" * 2 * PAGE,
        }

    def spoil() -> None:
        block.buf[SIZE - 1] ^= 1

    converse(prove, spoil)
    os._exit(0)


if __name__ == "__main__":
    main()
