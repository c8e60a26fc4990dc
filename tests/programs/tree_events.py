"""What processes wait with: an asyncio loop in a child, an inherited epoll, pidfds, a signalfd."""

import asyncio
import ctypes
import functools
import os
import select
import signal
import struct
import sys

from clib import call
from dialogue import PATIENCE_S, Proof, converse
from kin import Answer, Child

epoll = select.epoll()
ear, voice = os.pipe()
epoll.register(ear, select.EPOLLIN)


def readable(descriptor: int, timeout_s: float = PATIENCE_S) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def be_loop() -> Answer:
    """Runs an asyncio loop with a timer, a stream and a program that it has started."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    if sys.version_info < (3, 12):
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(loop)
        asyncio.set_child_watcher(watcher)
    event = asyncio.Event()

    async def begin() -> "tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]":
        pipe = asyncio.subprocess.PIPE
        cat = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        loop.call_later(0.05, event.set)
        return cat, loop.create_task(cat.stdout.readline())  # type: ignore[union-attr]  # a pipe

    cat, line = loop.run_until_complete(begin())

    async def go_on() -> bytes:
        await asyncio.wait_for(event.wait(), PATIENCE_S)
        if not line.done():
            cat.stdin.write(b"through cat\n")  # type: ignore[union-attr]  # a pipe
        return await asyncio.wait_for(line, PATIENCE_S)

    async def end() -> int:
        cat.stdin.close()  # type: ignore[union-attr]  # a pipe
        return await asyncio.wait_for(cat.wait(), PATIENCE_S)

    return lambda word: loop.run_until_complete(go_on() if word == "go on" else end())


def be_watcher() -> Answer:
    """Uses the epoll that it inherited, and has one of its own with pidfds in it."""
    sleeper = os.fork()
    if not sleeper:
        signal.pause()
    parent, child = os.pidfd_open(os.getppid()), os.pidfd_open(sleeper)
    own = select.epoll()
    own.register(parent, select.EPOLLIN)
    own.register(child, select.EPOLLIN)

    def answer(word: str) -> object:
        if word == "epoll":
            return epoll.poll(PATIENCE_S) == [(ear, select.EPOLLIN)]
        if word == "quiet":
            return own.poll(0) == []
        signal.pidfd_send_signal(child, signal.SIGKILL)
        told = own.poll(PATIENCE_S) == [(child, select.EPOLLIN)]
        return told and os.waitid(os.P_PIDFD, child, os.WEXITED).si_status == signal.SIGKILL

    return answer


def be_heard() -> Answer:
    """Takes its signals by a signalfd; one is pending."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    mask = ctypes.create_string_buffer(struct.pack("<16Q", 1 << (signal.SIGUSR1 - 1), *[0] * 15))
    signals = call("signalfd", -1, mask, os.O_NONBLOCK)
    os.kill(os.getpid(), signal.SIGUSR1)

    def answer(_: str) -> object:
        if not readable(signals):
            return "silent"
        number, _, _, sender = struct.unpack_from("<IiiI", os.read(signals, 128))
        return f"{number} {sender}"

    return answer


def main() -> None:
    loop, watcher, heard = Child(be_loop), Child(be_watcher), Child(be_heard)
    pidfds = {child.pid: os.pidfd_open(child.pid) for child in (loop, watcher, heard)}

    @functools.lru_cache(None)
    def finish() -> Proof:
        usr1 = int(signal.SIGUSR1)
        return {
            "pending signal": heard.ask("") == f"{usr1} {heard.pid}",
            "pidfds are quiet": watcher.ask("quiet") == "True",
            "pidfd of a grandchild": watcher.ask("end") == "True",
        }

    def prove() -> Proof:
        proof = finish()
        usr1 = int(signal.SIGUSR1)
        told = loop.ask("go on")
        os.write(voice, b"!")
        theirs = watcher.ask("epoll")
        ours = epoll.poll(0)
        os.read(ear, 1)
        for pidfd in pidfds.values():
            signal.pidfd_send_signal(pidfd, 0)
        signal.pidfd_send_signal(pidfds[heard.pid], signal.SIGUSR1)
        return {
            **proof,
            "asyncio": told == repr(b"through cat\n"),
            "epoll in the child": theirs == "True",
            "epoll here": ours == [(ear, select.EPOLLIN)],
            "quiet again": epoll.poll(0) == [],
            "living pidfds": not any(readable(pidfd, 0) for pidfd in pidfds.values()),
            "signal by a pidfd": heard.ask("") == f"{usr1} {os.getpid()}",
        }

    converse(prove, lambda: os.write(voice, b"?"))


main()
