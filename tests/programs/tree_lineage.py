"""A child, its child, and so on, five deep; each passes on what it is asked, and adds itself."""

import os
import threading

from dialogue import Proof, converse
from kin import Answer, Child

DEPTH = 5


def descend(depth: int) -> Answer:
    below = Child(lambda: descend(depth - 1)) if depth else None
    lock = threading.Lock()
    thread = threading.Thread(target=lock.acquire, daemon=True)
    lock.acquire()
    thread.start()
    os.environ["DEPTH"] = str(depth)
    own = bytearray([depth]) * (1 << 18)

    def answer(line: str) -> str:
        assert own == bytearray([depth]) * (1 << 18)
        assert thread.is_alive()
        said = f"{os.getppid()}>{os.getpid()} {os.environ['DEPTH']}"
        return f"{said}, {below.ask(line)}" if below else f"{said}, {line}"

    return answer


def main() -> None:
    top = Child(lambda: descend(DEPTH))
    before = top.ask("?")

    def prove() -> Proof:
        now = top.ask("!")
        return {
            "lineage": now == before.replace("?", "!"),
            "ours": now.startswith(f"{os.getpid()}>"),
        }

    def spoil() -> None:
        nonlocal before
        before = before[1:]

    converse(prove, spoil)


main()
