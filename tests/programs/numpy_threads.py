"""OpenBLAS on several threads: a matrix is multiplied without end; a move may not change a bit.

With a number as argument: that many steps, uninterrupted, and the digest. It begins anew after each
proof: else the next one would take longer than all before it together.
"""

import hashlib
import json
import sys
import threading
import time

import numpy as np
from dialogue import PATIENCE_S, Proof, converse

ORDER = 320


def start() -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(7)
    turn = np.linalg.qr(numbers.standard_normal((ORDER, ORDER)))[0]
    return turn, numbers.standard_normal((ORDER, ORDER))


def step(turn: np.ndarray, state: np.ndarray) -> np.ndarray:
    return np.sin(turn @ state) + turn


def digest(state: np.ndarray) -> str:
    return hashlib.sha256(state.tobytes()).hexdigest()


def main() -> None:
    turn, first = start()
    state = first
    if len(sys.argv) > 1:
        for _ in range(int(sys.argv[1])):
            state = step(turn, state)
        print(json.dumps(digest(state)))
        return

    taken = 0
    between_steps = threading.Lock()
    under_way = threading.Event()

    def multiply() -> None:
        nonlocal state, taken
        while True:
            with between_steps:
                state = step(turn, state)
                taken += 1
            if taken == 5:
                under_way.set()

    def prove() -> Proof:
        nonlocal state, taken
        deadline = time.monotonic() + PATIENCE_S
        while not taken and time.monotonic() < deadline:
            time.sleep(0.001)
        with between_steps:
            proof = {"arguments": [str(taken)], "answer": digest(state), "moving": taken > 0}
            state, taken = first, 0
            return proof

    def spoil() -> None:
        with between_steps:
            state[0, 0] = np.nextafter(state[0, 0], 9.0)

    threading.Thread(target=multiply, daemon=True).start()
    under_way.wait()
    converse(prove, spoil)


main()
