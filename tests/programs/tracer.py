"""A debugger of sorts: it has seized the process given as argument, and leaves it running."""

import ctypes
import os
import sys

from clib import call
from dialogue import Proof, converse

PTRACE_SEIZE = 0x4206


def main() -> None:
    traced = int(sys.argv[1])
    call("ptrace", ctypes.c_long(PTRACE_SEIZE), traced, None, None, restype=ctypes.c_long)

    def prove() -> Proof:
        with open(f"/proc/{traced}/status") as status:
            tracer = next(line for line in status if line.startswith("TracerPid"))
        return {"traces": int(tracer.split()[1]) == os.getpid()}

    converse(prove)


main()
