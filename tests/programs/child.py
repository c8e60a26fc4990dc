"""A process with a living child, both of which answer; nothing else."""

import subprocess
import sys

from dialogue import Proof, converse


def main() -> None:
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", "while True: print(input(), flush=True)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def prove() -> Proof:
        child.stdin.write(b"echo\n")
        child.stdin.flush()
        return {"child": child.poll() is None, "echo": child.stdout.readline() == b"echo\n"}

    converse(prove, child.kill)
    child.kill()
    child.wait()


main()
