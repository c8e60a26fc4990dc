"""`make demo`: a notebook kernel with half a gigabyte of work is dumped, ended, and brought back.

Everything is real: an ipykernel started as Jupyter starts it, the `lzy` command as a person types
it, and one client that is connected all the time and never told. The figures at the end are
measured in this very run, and stand beside what they have to be compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import session
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from lzy.cli.layout import count, duration, facts, paint, size

ROWS_OF_HALF_A_GIGABYTE = 4_400_000
CELL_TIMEOUT_S = 300
COMMAND_TIMEOUT_S = 300
SUBSCRIPTION_PERIOD_S = 0.1


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class Notebook:
    """A kernel, and the client that talks to it whatever becomes of it."""

    def __init__(self, folder: Path) -> None:
        # No pipe to us and no terminal: what a kernel prints goes to its clients.
        self.manager = KernelManager(connection_file=str(folder / "kernel.json"))
        self.manager.start_kernel(
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=str(folder),
        )
        provisioner: Any = self.manager.provisioner
        self.process: subprocess.Popen[bytes] = provisioner.process
        self.pid = self.process.pid
        self.seen_as = self.pid  # another number if it had to come back in a namespace of its own
        self.client = BlockingKernelClient(connection_file=self.manager.connection_file)
        self.client.load_connection_file()
        self.client.start_channels()

    def await_subscription(self) -> None:
        """Return once what the kernel publishes comes through.

        A kernel publishes to who has subscribed: what it says before that, after its start or after
        the client has had to connect anew, goes nowhere. So it is asked until an answer is heard.
        """
        deadline = time.monotonic() + CELL_TIMEOUT_S
        asked = set()
        while time.monotonic() < deadline:
            asked.add(self.client.kernel_info())
            try:
                while True:
                    message = self.client.get_iopub_msg(timeout=SUBSCRIPTION_PERIOD_S)
                    if message["parent_header"].get("msg_id") in asked:
                        return
            except queue.Empty:
                if not is_alive(self.seen_as):
                    raise DemoFailed(f"the kernel (pid {self.pid}) is gone") from None
        raise DemoFailed(f"the kernel does not answer within {CELL_TIMEOUT_S} s")

    def run(self, code: str) -> str:
        """Run a cell; what it printed. Raises DemoFailed if it failed or the kernel is gone."""
        deadline = time.monotonic() + CELL_TIMEOUT_S
        request = self.client.execute(code)
        printed = ""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Exception as error:  # queue.Empty, or a zmq error
                if not is_alive(self.seen_as):
                    raise DemoFailed(f"the kernel (pid {self.pid}) is gone") from error
                if time.monotonic() > deadline:
                    raise DemoFailed(f"no answer within {CELL_TIMEOUT_S} s") from error
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
            elif kind == "error":
                raise DemoFailed("a cell failed: " + "\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                return printed.strip()

    def close(self) -> None:
        """End the kernel, whether it is the one we started or the one that came back."""
        self.client.stop_channels()
        if self.seen_as != self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.seen_as, signal.SIGKILL)
        end_child(self.pid)
        self.process.returncode = 0  # reaped above; Popen must not wait for that pid any more
        self.manager.cleanup_resources()


def is_alive(pid: int) -> bool:
    """Whether `pid` exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def end_child(pid: int) -> None:
    """Kill and reap our child `pid`, if there is one."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == 0:  # ours and alive: the number cannot be another's
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_until_gone(pid: int, timeout_s: float) -> None:
    """Wait until `pid` (no child of ours) has ended."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise DemoFailed(f"process {pid} is still there after {timeout_s} s")
    finally:
        os.close(descriptor)


class Lzy:
    """The command, with a home of its own."""

    def __init__(self, home: Path) -> None:
        beside = Path(sys.executable).with_name("lzy")
        self.program = str(beside) if beside.exists() else (shutil.which("lzy") or "")
        if not self.program:
            raise DemoFailed("there is no lzy command in this environment; run `make demo`")
        self.environment = os.environ | {"LZY_HOME": str(home)}

    def call(self, *arguments: str, shown: bool = True) -> tuple[str, float]:
        """Run a command; what it printed, and the seconds from before its start to its end.

        Its progress line goes straight to the terminal.
        """
        if shown:
            print(paint(f"    $ lzy {' '.join(arguments)}", "bold"), flush=True)
        began = time.monotonic()
        command = subprocess.Popen(
            [self.program, *arguments], stdout=subprocess.PIPE, text=True, env=self.environment
        )
        try:
            printed, _ = command.communicate(timeout=COMMAND_TIMEOUT_S)
        except BaseException:
            # Ctrl-C went to the command as well; it undoes what it was at and ends by itself.
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(timeout=20)
            if command.poll() is None:
                command.kill()
                command.wait()
            raise
        took_s = time.monotonic() - began
        if shown:
            for line in printed.splitlines():
                print(f"    {line}")
        if command.returncode:
            raise DemoFailed(f"lzy {arguments[0]} failed (its message is above)")
        return printed, took_s


@contextlib.contextmanager
def step(title: str) -> Iterator[dict[str, float]]:
    """Announce a step, and say how long it took when it is over."""
    print(f"\n{paint('●', 'cyan')} {paint(title, 'bold')}", flush=True)
    measured: dict[str, float] = {}
    began = time.monotonic()
    yield measured
    measured.setdefault("s", time.monotonic() - began)
    print(paint(f"    {duration(measured['s'])}", "dim"), flush=True)


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def copying_rate() -> float:
    """Bytes a second of a plain memory copy, best of five: what nothing can beat."""
    source = bytearray(os.urandom(1 << 20)) * 64
    target = bytearray(len(source))
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        target[:] = source
        best = max(best, len(source) / (time.perf_counter() - began))
    return best


def show(lzy: Lzy, folder: Path, rows: int) -> dict[str, float]:
    """All steps; the figures."""
    figures: dict[str, float] = {}
    notebook: Notebook | None = None
    pager = 0
    try:
        with step("Start a notebook kernel, as Jupyter does") as took:
            notebook = Notebook(folder)
            notebook.await_subscription()
            say(f"ipykernel, pid {notebook.pid}, python {platform.python_version()}")
        figures["start_s"] = took["s"]

        with step("Work in it: a data frame, simulations, a generator half-way, a thread") as took:
            notebook.run(session.IMPORTS)
            notebook.run(session.COMPUTE.format(rows=rows, paths=rows // 48))
            notebook.run(session.ALIVE)
            where = notebook.run("print(where, '·', f'{len(orders):,} orders')")
            say(f"{where} · paths {notebook.run('print(paths.shape)')}")
        figures["compute_s"] = took["s"]
        proof = notebook.run(session.PROOF)
        threads, descriptors, ticks = map(int, notebook.run(session.ABOUT).split())
        say(f"fingerprint of all of it: {proof.split()[0]}")

        with step("Dump it: the process is written to an image, verified, and ended"):
            _, figures["dump_s"] = lzy.call("dump", str(notebook.pid), "--name", "notebook")
            notebook.process.wait()
            if is_alive(notebook.pid):
                raise DemoFailed("the kernel is still there after its dump")
            image = json.loads(lzy.call("images", "--json", shown=False)[0])["images"][0]
            figures["raw_bytes"] = image["raw_bytes"]
            figures["stored_bytes"] = image["stored_bytes"]
            say(f"pid {notebook.pid} no longer exists; its memory is free for others")

        with step("Bring it back, and have the same client run the next cell"):
            began = time.monotonic()
            printed, figures["restore_s"] = lzy.call("restore", "notebook")
            notebook.seen_as = pid_of(printed)
            notebook.await_subscription()
            answer = notebook.run(session.FIRST)
            figures["first_reply_s"] = time.monotonic() - began
            say(f"first reply   {answer}")
            say(f"next cell     {notebook.run(session.NEXT)}")
            figures["second_reply_s"] = time.monotonic() - began
            if (again := notebook.run("print(fingerprint())")) != proof:
                raise DemoFailed(f"the session is not what it was: {proof} became {again}")
            figures["everything_s"] = time.monotonic() - began
            say(f"fingerprint   {again.split()[0]}: every byte is as it was")
            later = int(notebook.run(session.ABOUT).split()[2])
            if later <= ticks:
                raise DemoFailed("the thread that counts stands still")
            say(f"the thread counts on: {ticks:,} ticks before, {later:,} now")
            if pager := pager_of(printed):
                wait_until_gone(pager, 60)
            figures["pager_gone_s"] = time.monotonic() - began

        with step("Once more, letting it run: a checkpoint"):
            report = json.loads(
                lzy.call("dump", str(notebook.seen_as), "--leave-running", "--json", shown=False)[0]
            )
            print(paint(f"    $ lzy dump {notebook.seen_as} --leave-running", "bold"))
            say(
                f"stopped for {duration(report['freeze_s'])}; {size(report['stored_bytes'])} newly "
                f"stored of {size(report['raw_bytes'])}, the rest was in the store already"
            )
            notebook.run("pass")
            figures["freeze_s"] = report["freeze_s"]
            figures["checkpoint_stored_bytes"] = report["stored_bytes"]
        figures["threads"], figures["descriptors"] = threads, descriptors
        figures["copy_bytes_per_s"] = copying_rate()
    finally:
        if notebook:
            notebook.close()
        if pager:
            with contextlib.suppress(DemoFailed):
                wait_until_gone(pager, 10)
    return figures


def pid_of(printed: str) -> int:
    """The process's pid, as it is seen from here, in what `lzy restore` printed."""
    found = re.search(r"^process +(\d+)", printed, re.MULTILINE)
    if not found:
        raise DemoFailed("lzy restore did not say which process it made")
    return int(found[1])


def pager_of(printed: str) -> int:
    """The pager's pid in what `lzy restore` printed, 0 when there is none."""
    _, found, rest = printed.partition("(pager ")
    return int(rest.partition(")")[0]) if found else 0


def summarise(figures: dict[str, float]) -> None:
    """The figures, each beside its floor."""
    raw, stored = figures["raw_bytes"], figures["stored_bytes"]
    copy_s = raw / figures["copy_bytes_per_s"]
    again_s = figures["start_s"] + figures["compute_s"]
    reply_s = figures["first_reply_s"]
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(f"\n{paint('What it took', 'bold')}")
    what = (
        f"{size(raw)}, {count(int(figures['threads']), 'thread')}, "
        f"{count(int(figures['descriptors']), 'descriptor')}"
    )
    gone = max(figures["pager_gone_s"], figures["everything_s"])
    lines = facts(
        [
            ("session", what),
            ("image", f"{size(stored)} ({100 * stored / raw:.0f} % of it)"),
            (
                "dump",
                f"{duration(figures['dump_s'])} until verified and ended: "
                f"{size(raw / figures['dump_s'])}/s",
            ),
            ("lzy restore", f"{duration(figures['restore_s'])} until the command returned"),
            ("first reply", f"{duration(reply_s)} after the command was given"),
            ("everything", f"read and compared after {duration(figures['everything_s'])}"),
            ("no trace", f"the pager had left after {duration(gone)}"),
            ("checkpoint", f"the running kernel stood still for {duration(figures['freeze_s'])}"),
        ]
    )
    floors = facts(
        [
            (
                "memory copy",
                f"{duration(copy_s)} for {size(raw)} ({size(figures['copy_bytes_per_s'])}/s)",
            ),
            ("starting anew", f"{duration(again_s)}: a new kernel and the same cells"),
        ]
    )
    print("\n".join(f"    {line}" for line in lines))
    print(f"\n{paint('To compare, measured in this run', 'bold')}")
    print("\n".join(f"    {line}" for line in floors))
    print(
        f"\n    The first reply came {again_s / reply_s:.0f} times sooner than starting anew; "
        f"the dump took {figures['dump_s'] / copy_s:.0f} memory copies."
    )
    print(paint(f"    {processor}, {os.cpu_count()} cores, Linux {platform.release()}", "dim"))


def _stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS_OF_HALF_A_GIGABYTE, help="of the frame")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    folder = Path(tempfile.mkdtemp(prefix="lzy-demo-"))
    try:
        print("A notebook kernel goes to sleep on disk and wakes up where it was.")
        figures = show(Lzy(folder / "home"), folder, arguments.rows)
        summarise(figures)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    except DemoFailed as failure:
        print(f"\nthe demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left behind", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
