"""A service on a port: draws random numbers, counts on in a thread, answers whoever connects."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
import time

random.seed(7)
mine = random.Random(8)
if "numpy" in sys.argv:
    import numpy

    numpy.random.seed(9)
    generator = numpy.random.default_rng(10)
ballast = bytearray(os.urandom(1 << 20)) * 4
digest = hash(bytes(ballast))
ticks = 0


def tick() -> None:
    global ticks
    while True:
        ticks += 1
        time.sleep(0.01)


threading.Thread(target=tick, daemon=True).start()
server = socket.create_server(("127.0.0.1", 0))
print("ready", flush=True)
print(server.getsockname()[1], flush=True)
elsewhere = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
asked = 0
while True:
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        asked += 1
        drawn = [random.getrandbits(64), mine.getrandbits(64)]
        if "numpy" in sys.argv:
            drawn += [int(numpy.random.randint(1 << 62)), int(generator.integers(1 << 62))]
        elsewhere.settimeout(0)
        try:
            cut = elsewhere.recv(1) == b""
        except (BlockingIOError, OSError):
            cut = False
        answer = {
            "pid": os.getpid(),
            "asked": asked,
            "ticks": ticks,
            "whole": hash(bytes(ballast)) == digest,
            "drawn": drawn,
            "cut": cut,
        }
        connection.sendall(json.dumps(answer).encode())
