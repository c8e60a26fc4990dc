"""A process with children that share its memory: `flock.py LOG COUNT SIZE_BYTES`.

`COUNT` processes in all. The first fills `SIZE_BYTES` with random bytes, forks the others, and each
writes a 64th of it anew. It says `ready`; on SIGUSR1 each child adds up what it sees, and the first
says `sum TOTAL` when all have. On SIGUSR2 each writes a hundredth anew, another one than its
neighbour, and the first says `wrote 0`.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    import numpy as np

    log_path, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    memory = np.frombuffer(bytearray(os.urandom(size)), dtype=np.uint8)
    lines = []
    part = size // 100
    for number in range(1, count):
        ask, asked = os.pipe()
        answer, told = os.pipe()
        if os.fork() == 0:
            os.close(asked)
            memory[: size // 64] = number
            os.write(told, b"r")
            while word := os.read(ask, 1):
                if word == b"!":
                    memory[(number % 90) * part : (number % 90 + 1) * part] += 1
                os.write(told, int(memory.sum(dtype=np.uint64)).to_bytes(8, "little"))
            os._exit(0)
        os.close(ask)
        os.close(told)
        os.read(answer, 1)
        lines.append((asked, answer))
    os.write(log, b"ready now\n")
    while True:
        writes = signal.sigwait({signal.SIGUSR1, signal.SIGUSR2}) == signal.SIGUSR2
        for asked, _ in lines:
            os.write(asked, b"!" if writes else b"?")
        total = sum(int.from_bytes(os.read(answer, 8), "little") for _, answer in lines)
        if writes:
            memory[:part] += 1
            os.write(log, b"wrote 0\n")
        else:
            os.write(log, f"sum {total + int(memory.sum(dtype=np.uint64))}\n".encode())


main()
