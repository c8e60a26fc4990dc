"""asyncio: timers, streams over TCP and a unix pair, a queue, an event, a thread; all waiting.

With the argument `uvloop` on that loop, which has an io_uring to talk to its epoll.
"""

import asyncio
import json
import os
import socket
import sys
import threading

from dialogue import PATIENCE_S, Proof, say


async def echo_squares(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b"%d\n" % int(line) ** 2)
        await writer.drain()


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(echo_squares, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    tcp_reader, tcp_writer = await asyncio.open_connection(*address)
    ours, theirs = socket.socketpair()
    pair_reader, pair_writer = await asyncio.open_connection(sock=ours)
    squaring = asyncio.create_task(  # held: what only a loop knows, garbage collection may take
        echo_squares(*await asyncio.open_connection(sock=theirs)), name="pair"
    )

    ticks = 0
    event = asyncio.Event()
    queue: asyncio.Queue[int] = asyncio.Queue()
    thread_event = threading.Event()
    fired: list[str] = []

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def await_event() -> str:
        await event.wait()
        return "event"

    async def add_up() -> int:
        return sum([await queue.get() for _ in range(3)])

    async def time_out() -> str:
        try:
            async with asyncio.timeout(1.5):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "not timed out"

    ticking = asyncio.create_task(tick())
    waiting = asyncio.create_task(await_event())
    adding = asyncio.create_task(add_up())
    timing_out = asyncio.create_task(time_out())
    in_thread = loop.run_in_executor(None, thread_event.wait)
    far = loop.call_later(3600, fired.append, "far")
    began = loop.time()
    loop.call_later(1.0, fired.append, "near")
    queue.put_nowait(1)
    # Bytes on the way: asked before the move, answered after it.
    tcp_writer.write(b"5\n")
    pair_writer.write(b"6\n")
    asked_before = True

    async def round_trip(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int
    ) -> bool:
        writer.write(b"%d\n" % n)
        return int(await reader.readline()) == n * n

    async def prove() -> Proof:
        nonlocal asked_before
        proof: Proof = {}
        if asked_before:
            asked_before = False
            proof["tcp, asked before"] = await tcp_reader.readline() == b"25\n"
            proof["pair, asked before"] = await pair_reader.readline() == b"36\n"
        proof["tcp"] = await round_trip(tcp_reader, tcp_writer, 9)
        proof["pair"] = await round_trip(pair_reader, pair_writer, 11)
        new_reader, new_writer = await asyncio.open_connection(*address)
        proof["server"] = await round_trip(new_reader, new_writer, 12)
        new_writer.close()
        before = ticks
        while ticks < before + 3:
            await asyncio.sleep(0.005)
        event.set()
        queue.put_nowait(2)
        queue.put_nowait(3)
        thread_event.set()
        proof["event"] = await waiting == "event"
        proof["queue"] = await adding == 6
        proof["thread"] = await in_thread is True
        proof["timeout"] = await timing_out == "timed out"
        while not fired:
            await asyncio.sleep(0.01)
        proof["timers"] = fired == ["near"] and loop.time() - began >= 1.0
        proof["far timer"] = 3000 < far.when() - loop.time() < 3600 and not far.cancelled()
        proof["ticking"] = not ticking.done() and not squaring.done()
        return proof

    async def prove_in_time() -> Proof:
        async with asyncio.timeout(PATIENCE_S):
            return await prove()

    words: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(0, lambda: [words.put_nowait(w) for w in os.read(0, 4096).decode().split()])
    say("ready")
    while (word := await words.get()) != "end":
        if word == "ping":
            say("pong")
        elif word == "spoil":
            far.cancel()
            say("spoiled")
        else:
            say(json.dumps(await prove_in_time()))
    os._exit(0)


if sys.argv[1:] == ["uvloop"]:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
