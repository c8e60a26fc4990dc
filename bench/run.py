"""`make bench`: measures what docs/performance.md claims, beside floors of the same run.

python bench/run.py                    everything, some five minutes, up to 5 GiB of memory
python bench/run.py --quick            sizes divided by eight: to see that it works
python bench/run.py faults eager       some cases
python bench/run.py --write            and put the table into docs/performance.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from cases import CASES, Bench
from figures import HEADS, Figure, as_markdown

from lzy.cli.layout import table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def measure(bench: Bench, names: list[str]) -> list[Figure]:
    """All figures of the named cases; a case that fails is a figure that says so."""
    found: list[Figure] = []
    for name in names:
        bench.say(name)
        try:
            found += CASES[name](bench)
        except Exception as error:
            bench.say(f"{name} failed: {error}")
            found.append(Figure(name, name, "", failure=str(error)))
        finally:
            for left in ("subject", "kernel", "store"):
                shutil.rmtree(bench.folder / left, ignore_errors=True)
    return found


def describe_machine(load_before: float) -> str:
    """Date, processor, kernel and how busy it was, in a line."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor}, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, Python {platform.python_version()}; load average "
        f"{load_before:.1f} before and {os.getloadavg()[0]:.1f} at the end"
    )


def write_document(text: str) -> None:
    """Put `text` between the marks of docs/performance.md."""
    document = DOCUMENT.read_text()
    before, mark, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{DOCUMENT} has no place for the figures ({BEGIN} … {END})")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="sizes divided by eight")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (5)")
    parser.add_argument("--folder", help="where stores are made (the disk that is measured)")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    parser.add_argument("--write", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    names = arguments.cases or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    signal.signal(signal.SIGTERM, _stop)
    folder = Path(tempfile.mkdtemp(prefix="lzy-bench-", dir=arguments.folder))
    os.environ["LZY_HOME"] = str(folder / "home")
    load = os.getloadavg()[0]
    try:
        bench = Bench(
            folder,
            8 if arguments.quick else 1,
            arguments.repeats,
            lambda text: print(f"  {text} …", file=sys.stderr, flush=True),
        )
        found = measure(bench, names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = describe_machine(load)
    rows = [figure.cells() for figure in found]
    print("\n".join(table(HEADS, rows, right=(1, 2, 3, 4, 5))))
    print(machine)
    if arguments.json:
        documents = [figure.as_document() for figure in found]
        Path(arguments.json).write_text(
            json.dumps({"machine": machine, "figures": documents}, indent=2) + "\n"
        )
    if arguments.write:
        write_document(f"{machine}.\n\n{as_markdown(found)}")
    return 1 if any(figure.failure for figure in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
