"""`make demo`: a notebook kernel works, is evicted by the daemon, and wakes on a larger node.

Everything is real: two nodes that are namespaces of this machine, the daemons that `lzy up` starts,
an ipykernel as Jupyter starts it, and a front end that only runs cells. Nobody tells lzy to put the
kernel to sleep; another program then takes its room; so its next cell runs on the larger node. The
figures and the timeline at the end are of this very run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import session
from notebook import FrontEnd, KernelGone

from lzy.cli.layout import count, duration, facts, paint, size

ROWS = 3_000_000
SMALL_BYTES = 1200 << 20
NODES = f"small:1cpu:{SMALL_BYTES >> 20}M,large:2cpu:4G"
# What takes minutes in earnest takes seconds here.
SAMPLE_S = 0.5
WINDOWS = (
    *("--doze-after", "3s", "--hibernate-after", "7s", "--notice", "1s"),
    *("--sample-every", f"{SAMPLE_S}s", "--after-wake", "10s"),
)
ADDRESSES = {"small": "10.77.0.2", "large": "10.77.0.3"}
PORTS = 51000
NEIGHBOUR = """import time
held = bytearray(b"x") * {bytes}
while True: sum(range(60_000)), time.sleep(0.02)
"""
PATIENCE_S = 120.0
STARTS_WITHIN_S = 30.0


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class Lzy:
    """The command, with a home of its own."""

    def __init__(self, home: Path) -> None:
        beside = Path(sys.executable).with_name("lzy")
        self.program = str(beside) if beside.exists() else (shutil.which("lzy") or "")
        if not self.program:
            raise DemoFailed("there is no lzy command in this environment; run `make demo`")
        self.home = home
        self.environment = os.environ | {"LZY_HOME": str(home)}

    def call(self, *arguments: str, words: str = "") -> float:
        """Run a command and print what it says; the seconds from before its start to its end.

        Its progress line goes straight to the terminal.
        """
        print(paint(f"    $ lzy {words or ' '.join(arguments)}", "bold"), flush=True)
        began = time.monotonic()
        printed = self._run(arguments)
        took_s = time.monotonic() - began
        for line in printed.splitlines():
            print(f"    {line}")
        return took_s

    def ask(self, *arguments: str) -> Any:
        """The document that a command prints with --json."""
        return json.loads(self._run((*arguments, "--json")))

    def _run(self, arguments: tuple[str, ...]) -> str:
        command = subprocess.Popen(
            [self.program, *arguments], stdout=subprocess.PIPE, text=True, env=self.environment
        )
        try:
            printed, _ = command.communicate(timeout=PATIENCE_S)
        except BaseException:
            # Ctrl-C went to the command as well; it undoes what it was at and ends by itself.
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(timeout=20)
            if command.poll() is None:
                command.kill()
                command.wait()
            raise
        if command.returncode:
            raise DemoFailed(f"lzy {arguments[0]} failed (its message is above)")
        return printed

    def start(self, node: str, *command: str) -> int:
        """Start a program on a node; its pid as it is numbered here."""
        subprocess.Popen(
            [self.program, "enter", node, "--", *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wanted = [word.encode() for word in command]
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            for pid in processes_of(self.home):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1] == wanted:
                        return pid
            time.sleep(0.02)
        raise DemoFailed(f"{command[0]} does not start on {node}")


def processes_of(home: Path) -> list[int]:
    """All processes that were started for a home: daemons, and what runs on its nodes."""
    begin, found = f"LZY_HOME={home}".encode(), []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if pid != os.getpid() and any(word.startswith(begin) for word in words):
                found.append(pid)
    return found


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


def write_connection(folder: Path) -> Path:
    """A connection file as Jupyter writes it, for a kernel that listens on its node's address."""
    names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
    path = folder / "kernel.json"
    document = {name: PORTS + number for number, name in enumerate(names)} | {
        "ip": "0.0.0.0",
        "key": secrets.token_hex(16),
        "transport": "tcp",
        "signature_scheme": "hmac-sha256",
        "kernel_name": "",
    }
    path.write_text(json.dumps(document))
    return path


class Story:
    """The steps, one after the other; `figures` are what they measured."""

    def __init__(self, lzy: Lzy, folder: Path, rows: int) -> None:
        self.lzy, self.folder, self.rows = lzy, folder, rows
        self.figures: dict[str, float] = {}
        self.cells: list[tuple[float, str]] = []

    def tell(self) -> None:
        """All steps."""
        self.begin()
        front_end = self.start_kernel()
        try:
            self.work(front_end)
            self.leave_alone()
            self.have_a_neighbour()
            self.go_on(front_end)
        finally:
            front_end.close()

    def begin(self) -> None:
        with step("Two nodes, a daemon that looks after both") as took:
            self.lzy.call("up", "--nodes", NODES, *WINDOWS)
        self.figures["up_s"] = took["s"]

    def start_kernel(self) -> FrontEnd:
        from lzy.agent.network import enter_fabric

        with step("A notebook kernel on the small node, as Jupyter starts it") as took:
            path = write_connection(self.folder)
            words = ("-m", "ipykernel_launcher", "-f", str(path))
            self.pid = self.lzy.start("small", sys.executable, *words)
            enter_fabric(self.lzy.home)  # where the nodes can be reached; for this thread's sockets
            front_end = FrontEnd(str(path), ADDRESSES["small"])
            front_end.await_subscription()
            say(f"ipykernel, python {platform.python_version()}")
            took["s"] = time.monotonic() - self.began_of(self.pid)
        self.figures["start_s"] = took["s"]
        with step("lzy looks after it from now on; it notices nothing") as took:
            self.figures["attach_s"] = self.lzy.call(
                "attach",
                str(path),
                "--name",
                "notebook",
                words="attach kernel.json --name notebook",
            )
        return front_end

    @staticmethod
    def began_of(pid: int) -> float:
        """When a process began, by the clock of time.monotonic()."""
        from lzy.checkpoint import proc

        return proc.start_time(pid) / os.sysconf("SC_CLK_TCK") + (
            time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME)
        )

    def run(self, front_end: FrontEnd, words: str, code: str) -> str:
        """Run a cell, and note when."""
        self.cells.append((time.time(), words))
        return front_end.run(code)

    def work(self, front_end: FrontEnd) -> None:
        with step("Work: a data frame, simulations, a generator half-way, a thread") as took:
            began = time.monotonic()
            self.run(front_end, "import numpy, pandas", session.IMPORTS)
            code = session.COMPUTE.format(rows=self.rows, paths=self.rows // 48)
            self.run(front_end, f"orders: {self.rows:,} rows, group by; random walks", code)
            front_end.run(session.ALIVE)
            took["s"] = time.monotonic() - began
            where = front_end.run("print(where, '·', f'{len(orders):,} orders')")
            say(f"{where} · paths {front_end.run('print(paths.shape)')}")
            self.proof = front_end.run(session.PROOF)
            self.threads, self.descriptors, self.ticks = map(
                int, front_end.run(session.ABOUT).split()
            )
            say(f"fingerprint of all of it: {self.proof.split()[0]}")
        self.figures["compute_s"] = took["s"]

    def leave_alone(self) -> None:
        """Nobody types; say what the daemon does, as it does it."""
        from lzy.agent.client import Client
        from lzy.cli.events import describe

        with step("Nobody types any more: the daemon sees to it"):
            client, seen = Client(self.lzy.home), set[tuple[str, int]]()
            self.figures["held_bytes"] = self.look()["memory_bytes"]
            deadline = time.monotonic() + PATIENCE_S
            state = ""
            while state != "hibernated":
                if time.monotonic() > deadline:
                    self.lzy.call("why", "notebook")
                    raise DemoFailed("the kernel does not hibernate")
                time.sleep(0.1)
                found = self.look()
                events = client.get("/v1/events?last=200&session=notebook")["events"]
                for event in events:
                    if (place := (event["node"], event["number"])) not in seen:
                        seen.add(place)
                        if event["kind"] != "attached":
                            say(describe(event))
                if state == "" and found["state"] == "dozing":
                    state = "dozing"
                    self.figures["dozing_bytes"] = found["memory_bytes"]
                if state == "dozing":
                    held = min(self.figures["dozing_bytes"], found["memory_bytes"])
                    self.figures["dozing_bytes"] = held
                state = "hibernated" if found["state"] == "hibernated" else state
            self.lzy.call("ps")
            image = self.lzy.ask("images")["images"][0]
            self.figures["raw_bytes"] = image["raw_bytes"]
            self.figures["stored_bytes"] = sum(
                found["new_bytes"] for found in self.lzy.ask("log", "notebook")["checkpoints"]
            )

    def look(self) -> dict[str, Any]:
        """The session as the fleet has it."""
        from lzy.agent.client import Client

        return Client(self.lzy.home).get("/v1/sessions/notebook")

    def have_a_neighbour(self) -> None:
        with step("Meanwhile somebody else uses what it gave back"):
            code = NEIGHBOUR.format(bytes=int(0.66 * SMALL_BYTES))
            pid = self.lzy.start("small", sys.executable, "-c", code)
            self.lzy.call("attach", str(pid), "--name", "neighbour")
            deadline = time.monotonic() + PATIENCE_S
            while True:
                found = {s["name"]: s for s in self.lzy.ask("ps")}["neighbour"]
                if found["memory_bytes"] > 0.6 * SMALL_BYTES and found["verdicts"]:
                    break
                if time.monotonic() > deadline:
                    raise DemoFailed("the neighbour does not grow")
                time.sleep(0.1)
            self.lzy.call("nodes")

    def go_on(self, front_end: FrontEnd) -> None:
        with step(
            "The next cell: its front end asks for the kernel, which wakes where there is room"
        ):
            began = time.monotonic()
            self.figures["wake_s"] = self.lzy.call("wake", "notebook")
            node = self.look()["node"]
            if node != "large":
                raise DemoFailed(f"it woke on {node}")
            front_end.move(ADDRESSES[node])
            front_end.await_subscription()
            answer = self.run(front_end, "the generator's next, rows of the frame", session.FIRST)
            self.figures["first_reply_s"] = time.monotonic() - began
            say(f"first reply   {answer}")
            said = self.run(front_end, "filter, group by, the three largest", session.NEXT)
            say(f"next cell     {said}")
            again = self.run(front_end, "every byte read and compared", "print(fingerprint())")
            if again != self.proof:
                raise DemoFailed(f"the session is not what it was: {self.proof} became {again}")
            self.figures["everything_s"] = time.monotonic() - began
            say(f"fingerprint   {again.split()[0]}: every byte is as it was")
            later = int(front_end.run(session.ABOUT).split()[2])
            if later <= self.ticks:
                raise DemoFailed("the thread that counts stands still")
            say(f"the thread counts on: {self.ticks:,} ticks before, {later:,} now")
            said = self.run(
                front_end, "more walks than the small node had memory for", session.MORE
            )
            say(f"another cell  {said}")
            time.sleep(2 * SAMPLE_S)  # for the timeline: so that it was looked at

    def draw(self, svg: Path) -> None:
        """The timeline of both sessions, in the terminal and as a picture."""
        from lzy.agent.client import Client
        from lzy.cli.lanes import Mark
        from lzy.cli.timeline import describe, gather
        from lzy.cli.timeline_svg import write_svg

        now_s = time.time()
        pasts, since_s = gather(Client(self.lzy.home), ("notebook", "neighbour"), now_s, None)
        cells = [Mark(at_s, "cell", words) for at_s, words in self.cells]
        first = pasts[0]
        pasts[0] = first._replace(marks=sorted([*first.marks, *cells]))
        columns = shutil.get_terminal_size((100, 24)).columns
        print(f"\n{paint('What happened', 'bold')} (lzy timeline draws it of any session)\n")
        for line in describe(pasts, since_s, now_s, columns - 4)[1:]:
            print(f"    {line}")
        title = "A notebook kernel works, is evicted, and wakes on a larger node"
        svg.write_text(write_svg(title, pasts, since_s, now_s))

    def sum_up(self, svg: Path) -> None:
        """The figures, each beside what it has to be compared with."""
        f = self.figures
        again_s = f["start_s"] + f["compute_s"]
        raw, stored = f["raw_bytes"], f["stored_bytes"]
        held = f"{count(self.threads, 'thread')}, {count(self.descriptors, 'descriptor')}"
        lines = facts(
            [
                ("session", f"{size(f['held_bytes'])}, {held}"),
                ("attached", f"after {duration(f['attach_s'])}, while it ran"),
                ("dozing", f"it held {size(f['dozing_bytes'])}"),
                (
                    "hibernated",
                    f"nothing; {size(stored)} in the store ({100 * stored / raw:.0f} %)",
                ),
                ("lzy wake", f"{duration(f['wake_s'])} until the command returned"),
                ("first reply", f"{duration(f['first_reply_s'])} after the command was given"),
                ("everything", f"read and compared after {duration(f['everything_s'])}"),
                ("starting anew", f"{duration(again_s)}: a new kernel and the same cells"),
                ("picture", str(svg)),
            ]
        )
        print(f"\n{paint('What it took', 'bold')}")
        print("\n".join(f"    {line}" for line in lines))
        print(
            f"\n    The first reply came {again_s / f['first_reply_s']:.0f} times sooner than "
            "starting anew."
        )
        print(
            paint(f"    {_processor()}, {os.cpu_count()} cores, Linux {platform.release()}", "dim")
        )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# -- nothing is left behind ------------------------------------------------------------------------


def clean_up(lzy: Lzy, folder: Path) -> None:
    """End all that was started for the demo's home, and remove it; may be done twice."""
    quiet = subprocess.DEVNULL
    for words in (("detach", "notebook"), ("detach", "neighbour"), ("down", "--abandon")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if processes_of(lzy.home):
                command = [lzy.program, *words]
                subprocess.run(command, stdout=quiet, stderr=quiet, env=lzy.environment, timeout=60)
    deadline = time.monotonic() + 3
    while (left := processes_of(lzy.home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:  # an `lzy up` that was interrupted half-way
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def keep_watch(work: Callable[[], int], clean: Callable[[], None]) -> int:
    """Do `work` in a child, and clean up behind it, however it or we are ended."""
    from lzy.checkpoint.linux.process import PR_SET_PDEATHSIG, prctl

    watcher = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, _stop)
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            status = work()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            if os.getppid() != watcher:
                clean()
            os._exit(status)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child hears it, too, and ends

    def forward(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        clean()
    return os.waitstatus_to_exitcode(status)


def _stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the frame")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--svg", metavar="FILE", default="lzy-demo.svg", help="the picture")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lzy-demo-"))
    lzy = Lzy(folder / "home")

    def work() -> int:
        story = Story(lzy, folder, arguments.rows)
        try:
            print("A notebook kernel works, is evicted by the daemon, and wakes on a larger node.")
            story.tell()
            story.draw(Path(arguments.svg))
            story.sum_up(Path(arguments.svg))
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(story.figures, indent=2) + "\n")
        except (DemoFailed, KernelGone) as failure:
            print(f"\nthe demo failed: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        return 0

    status = keep_watch(work, lambda: clean_up(lzy, folder))
    if status in (130, 143):
        print("\ninterrupted; nothing is left behind", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
