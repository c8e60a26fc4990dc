"""How long a program stands still, by its size: `python bench/stops.py [OPTION…] MEBIBYTES…`.

The program has so much random memory in pages of 4 KiB, and writes to some 200 of them a second,
all over; so does each of its `--workers N`, which are programs of their own. Before each further
checkpoint it fills `--loaded N` MiB anew, as one does who reads data. Of a first checkpoint and of
three further ones this prints how long the stop took, what was written meanwhile, and the longest
pause that the program itself saw. Everything is ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import mmap, os, random, subprocess, sys, threading, time
size, workers = int(sys.argv[1]) << 20, int(sys.argv[2])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
block = os.urandom(1 << 20)
for at in range(0, size, 1 << 20):
    memory[at : at + (1 << 20)] = block[at >> 20 :] + block[: at >> 20]
command = [sys.executable, "-c", sys.argv[3], sys.argv[1], "0", sys.argv[3]]
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
below = [subprocess.Popen(command, **pipes) for _ in range(workers)]
for worker in below:
    worker.stdout.readline()
longest = 0.0
def write():
    global longest
    while True:
        began = time.monotonic()
        at = random.randrange(size >> 12) << 12
        memory[at : at + 8] = os.urandom(8)
        time.sleep(0.005)
        longest = max(longest, time.monotonic() - began - 0.005)
threading.Thread(target=write, daemon=True).start()
print(flush=True)
loaded = {}
for line in sys.stdin:
    seen, longest = longest, 0.0
    for at in range(int(line)):
        loaded.setdefault(at, bytearray(1 << 20))[:] = block[at:] + block[:at]
    print(seen, flush=True)
"""
REST_S = 1.0


def main() -> None:
    """Measure, and print a block for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="+", metavar="MEBIBYTES")
    parser.add_argument("--workers", type=int, default=0, metavar="N")
    parser.add_argument("--loaded", type=int, default=0, metavar="MEBIBYTES")
    asked = parser.parse_args()
    for size in asked.sizes:
        print(f"\n{size} MiB" + (f", and {asked.workers} workers of as much" * bool(asked.workers)))
        measure(size, asked.workers, asked.loaded)


def measure(mebibytes: int, workers: int, loaded: int) -> None:
    """Print a line for each of four checkpoints of one program."""
    folder = Path(tempfile.mkdtemp(prefix="lzy-bench-"))
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(mebibytes), str(workers), PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    asked, answers = program.stdin, program.stdout
    assert asked
    assert answers

    def ask(load: int = 0) -> float:
        print(load, file=asked, flush=True)
        return float(answers.readline())

    try:
        answers.readline()
        for what in ("first", "further", "further", "further"):
            time.sleep(REST_S)
            ask(loaded if what == "further" else 0)
            words = ("dump", str(program.pid), "--leave-running", "--name", "it", "--json")
            command = [str(Path(sys.executable).with_name("lzy")), *words]
            store = ("--store", str(folder / "store"))
            told = json.loads(subprocess.run([*command, *store], stdout=-1, check=True).stdout)
            print(
                f"  {what:8} {1e3 * told['freeze_s']:6.1f} ms"
                f"   written {told['written_bytes'] / 1048576:7.1f} MiB"
                f"   of {1e3 * told['total_s']:5.0f} ms"
                f"   longest pause seen {1e3 * ask():6.1f} ms"
            )
    finally:
        asked.close()  # its workers' ends close with it
        program.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
