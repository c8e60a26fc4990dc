"""Real programs are dumped in mid-life and restored; then each is asked to prove its state."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import PATIENCE_S, PROGRAMS, Case, Holds, await_end, list_children, wait_readable

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]


QUICK = [
    Case("asyncio_streams"),
    Case("asyncio_streams", ("uvloop",)),
    Case("churn"),
    Case("clocks"),
    Case("cpu_clocks"),
    Case("ctypes_callbacks"),
    Case("deleted_files", ("{folder}",)),
    Case("dead_main_thread"),
    Case("descriptors", ("{folder}",)),
    Case("filters"),
    Case("generators"),
    Case("heap"),
    Case("hundred_threads"),
    Case("interpreter"),
    Case("io_uring"),
    Case("leases", ("{folder}",)),
    Case("locked_memory"),
    Case("locks"),
    Case("mapped_files", ("{folder}",)),
    Case("mappings"),
    Case("memory_pattern"),
    Case("message_queues"),
    Case("netlink_socket"),
    Case("numpy_threads"),
    Case("robust_mutexes"),
    Case("signals"),
    Case("sockets", ("{folder}",)),
    Case("sqlite_transaction", ("{folder}/base", "delete")),
    Case("sqlite_transaction", ("{folder}/base", "wal")),
    Case("stacks"),
    Case("system_v_memory"),
    Case("system_v_queues"),
]
# Their imports take seconds, so nothing but the essential is done with them.
HEAVY = [Case("pandas_frame"), Case("sklearn_fit"), Case("torch_autograd")]
ALL = [*QUICK, *HEAVY]
SAMPLED = ("dead_main_thread", "descriptors", "memory_pattern", "signals")
SOME = [case for case in QUICK if case.name in SAMPLED]

every_program = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
quick_programs = pytest.mark.parametrize("case", QUICK, ids=lambda case: case.id)
some_programs = pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
both_ways = pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])


@every_program
def test_proof_can_fail(start: Start, case: Case) -> None:
    """Without any dump the proof fails once the program has spoiled its own state."""
    quickly = {**os.environ, "LZY_TEST_PATIENCE_S": "5"}  # it need not wait long for what never is
    program = start(case.name, *case.arguments, env=quickly).await_ready()
    assert program.ask("ping") == "pong"
    assert program.ask("spoil") == "spoiled"
    with pytest.raises(AssertionError):
        program.prove()


@quick_programs
def test_proof_holds_uninterrupted(start: Start, case: Case) -> None:
    """A program that nobody touches proves its state, twice: what fails elsewhere is lzy's."""
    program = start(case.name, *case.arguments).await_ready()
    program.prove()
    program.prove()


@both_ways
@every_program
def test_restored_program_proves_its_state(
    start: Start, lzy: CommandLine, case: Case, way: tuple[str, ...]
) -> None:
    """Dumped in mid-life (which ends it) and restored, a program goes on as if nothing had been."""
    program = start(case.name, *case.arguments).await_ready()
    before = program.pid
    lzy.dump(program)
    lzy.restore(program, "image", *way)
    assert program.pid == before
    program.prove()
    assert program.ask("ping") == "pong"


# What these two change in files and take in names outlasts their first life, by their nature.
@pytest.mark.parametrize(
    "case",
    [case for case in QUICK if case.name not in ("sqlite_transaction", "sockets")],
    ids=lambda case: case.id,
)
def test_checkpointed_program_runs_on_and_its_image_is_whole(
    start: Start, lzy: CommandLine, case: Case
) -> None:
    """Left running, the program proves its state; so does, later, what is in the image."""
    program = start(case.name, *case.arguments).await_ready()
    lzy.dump(program, "image", "--leave-running")
    if case.name in ("mapped_files", "descriptors", "system_v_memory"):
        assert program.ask("ping") == "pong"  # Its proof writes to the files that the image needs.
    else:
        program.prove()
    program.end()
    lzy.restore(program, "image")
    program.prove()


@some_programs
@both_ways
def test_restored_in_a_new_pid_namespace(
    start: Start, lzy: CommandLine, case: Case, way: tuple[str, ...]
) -> None:
    """Where its pid is taken, a program lives on in a PID namespace of its own, with its pids."""
    program = start(case.name, *case.arguments).await_ready()
    before = program.pid
    lzy.dump(program)
    report = lzy.restore(program, "image", "--pid-namespace", "new", *way)
    assert report["pid_in_namespace"] == before != program.pid
    program.prove()


def test_pid_taken(start: Start, lzy: CommandLine) -> None:
    """`auto` finds the pid taken and makes a namespace; `host` says so and makes nothing."""
    program = start("interpreter").await_ready()
    lzy.dump(program, "image", "--leave-running")
    error = lzy.fail("restore", "image", "--store", str(lzy.store), "--pid-namespace", "host")
    assert str(program.pid) in error["message"]
    report = lzy.succeed("restore", "image", "--store", str(lzy.store))
    pidfd = os.pidfd_open(report["pid"])
    try:
        assert report["pid_in_namespace"] == program.pid != report["pid"]
        # Two now read the same FIFO: the original is ended, the other answers.
        program.end()
        program.adopt(report["pid"])
        program.prove()
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


#: Is the process of that number; ends with its input.
TAKER = """
import os, sys
from lzy.checkpoint.linux.process import clone3
if clone3(set_tid=int(sys.argv[1])) == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
os.wait()
"""


@contextlib.contextmanager
def taken(number: int) -> Iterator[None]:
    """Somebody else has that number, of a process or a thread."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKER, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("name", ["numpy_threads", "tree_groups"])
@pytest.mark.parametrize("namespace", ["auto", "host"])
def test_number_taken_in_the_midst_of_a_restore(
    start: Start, lzy: CommandLine, tmp_path: Path, name: str, namespace: str
) -> None:
    """Of a thread, or of a child: it lives apart then; `host` says so, and leaves nothing."""
    program = start(name).await_ready()
    threads = {int(tid) for tid in os.listdir(f"/proc/{program.pid}/task")}
    number = (list_children(program.pid) or sorted(threads))[-1]
    assert number != program.pid
    lzy.dump(program)
    holds = Holds(tmp_path / "holds")
    lzy.environment |= holds.environment
    holds.hold("restore.executed")
    words = ("restore", "image", "--store", str(lzy.store), "--pid-namespace", namespace)
    command = lzy.start(*words, "--json")
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not holds.is_held("restore.executed"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with taken(number):
            holds.let_go()
            told, complaint = command.communicate(timeout=PATIENCE_S)
            if namespace == "auto":
                assert command.returncode == 0, complaint.decode()
                report = json.loads(told)
                assert f"pid {number} is taken" in " ".join(report["notes"])
                program.adopt(report["pid"])
                program.prove()
            else:
                assert command.returncode == 8
                assert f"pid {number} is taken by python" in json.loads(told)["error"]["message"]
    finally:
        command.kill()
        command.communicate()
    if namespace == "host":
        lzy.restore(program)
        program.prove()


def test_nobody_who_looks_makes_a_stack_longer(
    start: Start, lzy: CommandLine, tmp_path: Path
) -> None:
    """In the midst of a restore there is no command line to be read where nothing is mapped.

    Were there one below a stack that may grow, the kernel would have it grow to there.
    """
    program = start("heap").await_ready()
    pid = program.pid
    lzy.dump(program)
    holds = Holds(tmp_path / "holds")
    lzy.environment |= holds.environment
    holds.hold("restore.mapped")
    command = lzy.start("restore", "image", "--store", str(lzy.store), "--json")
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not holds.is_held("restore.mapped"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[45:49]
        assert words[0] == words[1]
        assert words[2] == words[3]
        holds.let_go()
        told, complaint = command.communicate(timeout=PATIENCE_S)
        assert command.returncode == 0, complaint.decode()
    finally:
        command.kill()
        command.communicate()
    program.adopt(json.loads(told)["pid"])
    assert Path(f"/proc/{program.pid}/cmdline").read_bytes().startswith(sys.executable.encode())
    program.prove()


@some_programs
def test_dumped_and_restored_again_and_again(start: Start, lzy: CommandLine, case: Case) -> None:
    """What was restored can be dumped, also while its pager is at work; five times over."""
    program = start(case.name, *case.arguments).await_ready()
    for cycle in range(5):
        lzy.dump(program, f"image{cycle}")
        lzy.restore(program, f"image{cycle}", *(["--eager"] if cycle % 2 else []))
        program.prove()


def test_one_image_many_times(start: Start, lzy: CommandLine) -> None:
    """An image is not used up: each restore begins at the same instant."""
    program = start("generators").await_ready()
    lzy.dump(program)
    for way in ("--eager", "--eager", "--json"):
        lzy.restore(program, "image", way)
        program.prove()
        program.end()


def test_command_on_the_way_arrives_once(start: Start, lzy: CommandLine) -> None:
    """A line that came while the program was away is read by it, once, when it is back."""
    program = start("interpreter").await_ready()
    lzy.dump(program)
    program.say("ping")
    lzy.restore(program)
    assert program.hear() == "pong"
    assert program.ask("ping") == "pong"


def test_peer_outside_is_gone(start: Start, lzy: CommandLine) -> None:
    """A TCP connection to somebody outside: what had arrived is read, then the stream ends."""
    program = start("sockets", "{folder}", "outside")
    stranger = socket.create_connection(("127.0.0.1", int(program.hear())))
    with stranger:
        stranger.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stranger.sendall(b"first")
        program.await_ready()
        stranger.sendall(b"queued")
        lzy.dump(program)
        lzy.restore(program)
        program.prove()


def test_standard_descriptors_point_where_they_are_told(
    start: Start, lzy: CommandLine, tmp_path: Path
) -> None:
    """--stdin, --stdout and --stderr put files in the place of what is gone."""
    command = [sys.executable, "-uc", "import sys; print('ready'); [print(l, end='') or "
               "print('heard', file=sys.stderr) for l in sys.stdin]"]  # fmt: skip
    program = start(command=command).await_ready()
    lzy.dump(program)
    files = {name: tmp_path / name for name in ("stdin", "stdout", "stderr")}
    files["stdin"].write_text("one\ntwo\n")
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    lzy.restore(program, "image", *options)
    program.await_end()
    assert files["stdout"].read_text() == "one\ntwo\n"
    assert files["stderr"].read_text() == "heard\nheard\n"


@pytest.mark.shows("cut", "standard streams that were pipes to somebody")
def test_pipes_to_others_end(lzy: CommandLine, tmp_path: Path, nothing_left_behind: None) -> None:
    """Standard streams that were pipes to somebody: what was on the way is read, then they end."""
    code = (
        "import sys; print('ready', flush=True); heard = sys.stdin.read(); "
        "open(sys.argv[1], 'w').write(heard + 'end')"
    )
    told = tmp_path / "told"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        child.stdin.write(b"on the way, ")
        child.stdin.flush()
        lzy.succeed("dump", str(child.pid), "--store", str(lzy.store))
        child.wait(PATIENCE_S)
        child.stdin.close()
        report = lzy.succeed("restore", "--store", str(lzy.store))
        await_end(report["pid"])
        assert told.read_text() == "on the way, end"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_pager_leaves_no_trace(start: Start, lzy: CommandLine) -> None:
    """When the last page is in, the pager is gone, and so are its files and its descriptor."""
    program = start("memory_pattern").await_ready()
    before = sorted(os.listdir(f"/proc/{program.pid}/fd"))
    lzy.dump(program)
    report = lzy.restore(program)
    assert report["lazy"]
    await_end(report["pager_pid"])
    assert sorted(os.listdir(f"/proc/{program.pid}/fd")) == before
    left = [path.name for path in (lzy.home / "run").rglob("*") if not path.is_dir()]
    assert left == [f"{program.pid}.session"]  # which checkpoint it goes on from
    program.prove()


@pytest.mark.shows("survives", "being stopped (SIGSTOP)")
def test_stopped_process_stays_stopped(start: Start, lzy: CommandLine) -> None:
    """A process that somebody stopped is stopped after a checkpoint, and after a restore."""
    program = start("interpreter").await_ready()
    stop_and_wait(program)
    lzy.dump(program, "checkpoint", "--leave-running")
    await_state(program, "T")
    lzy.dump(program)
    lzy.restore(program)
    await_state(program, "T")
    signal.pidfd_send_signal(program.pidfd, signal.SIGCONT)
    program.prove()


def stop_and_wait(program: Program) -> None:
    """SIGSTOP, told by waitid that it has worked."""
    os.kill(program.pid, signal.SIGSTOP)
    stopped = os.waitid(os.P_PID, program.pid, os.WSTOPPED)
    assert stopped is not None
    assert stopped.si_pid == program.pid


def await_state(program: Program, letter: str) -> None:
    """Wait until the process is in that state; one let go by its tracer takes a moment to stop."""
    deadline = time.monotonic() + 10
    while (state := read_state(program)) != letter:
        assert time.monotonic() < deadline, f"state {state}, not {letter}"
        os.sched_yield()


def read_state(program: Program) -> str:
    """The letter of the process's state in /proc."""
    return Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0]


def find_interpreters() -> list[str]:
    """`LZY_TEST_PYTHONS` (paths, with colons between), else those on PATH and beside ours.

    Scripts that stand for an interpreter (pyenv's shims) are passed over; one of each version.
    """
    if given := os.environ.get("LZY_TEST_PYTHONS"):
        return given.split(":")
    on_path = [shutil.which(f"python3.{minor}") for minor in range(8, 16)]
    beside = sorted(Path(sys.base_prefix).parent.glob("3.*/bin/python3"))
    found = {}
    for path in map(os.path.realpath, [*filter(None, on_path), *beside]):
        version = re.fullmatch(r"python3\.(\d+)", os.path.basename(path))
        with open(path, "rb") as file:
            is_program = file.read(4) == b"\x7fELF"
        if is_program and version and 8 <= int(version[1]) != sys.version_info.minor:
            found.setdefault(version[0], path)
    return [sys.executable, *found.values()]


@pytest.mark.parametrize("executable", find_interpreters(), ids=os.path.basename)
def test_any_interpreter(start: Start, lzy: CommandLine, executable: str) -> None:
    """What is dumped may be an interpreter of another version than lzy's own."""
    program = start(command=[executable, str(PROGRAMS / "interpreter.py")]).await_ready()
    lzy.dump(program)
    lzy.restore(program)
    program.prove()


@both_ways
@pytest.mark.shows("survives", "bash, with its variables and traps")
def test_shell(start: Start, lzy: CommandLine, way: tuple[str, ...]) -> None:
    """bash reading commands: its variables, functions and traps, and a new child afterwards."""
    program = start(command=["bash", "--norc"])
    program.say("counter=41; greet() { echo \"hello $1\"; }; trap 'echo caught' USR1; echo ready")
    program.await_ready()
    lzy.dump(program)
    lzy.restore(program, "image", *way)
    assert program.ask("echo $((++counter))") == "42"
    assert program.ask("greet world") == "hello world"
    assert program.ask("kill -USR1 $$") == "caught"
    assert program.ask("cat /proc/$$/comm") == "bash"


@pytest.mark.shows("survives", "io_urings, filters and locked memory of a descendant")
@pytest.mark.parametrize("name", ["dead_main_thread", "filters", "io_uring", "locked_memory"])
def test_what_a_descendant_has(start: Start, lzy: CommandLine, name: str) -> None:
    """The child of a shell has what few processes have; shell and child are one tree."""
    words = f"{sys.executable} {PROGRAMS / name}.py; true"
    program = start(command=["bash", "-c", words]).await_ready()
    lzy.dump(program)
    lzy.restore(program)
    program.prove()


@pytest.mark.parametrize(
    "stage", ["dump.seized", "dump.prepared", "dump.described", "dump.split", "dump.committed"]
)
def test_checkpoint_killed_without_a_main_thread(
    start: Start, lzy: CommandLine, stage: str
) -> None:
    """Whenever lzy dies at it, a process without a main thread runs on, and can be dumped."""
    program = start("dead_main_thread").await_ready()
    where = ("--store", str(lzy.store), "--name", "image", "--leave-running")
    assert lzy.run("dump", str(program.pid), *where, kill_at=stage).returncode == -signal.SIGKILL
    program.prove()
    lzy.dump(program, "next")
    lzy.restore(program, "next")
    program.prove()


CALLER = """
import os, socket, sys, threading, time
server = socket.create_server(("127.0.0.1", 0))
done, called = [0], threading.Event()
def call():
    with socket.create_connection(server.getsockname()) as client:
        client.sendall(b"?")
        called.set()
        client.recv(1)
        done[0] += 1
def serve():
    while True:
        called.clear()
        threading.Thread(target=call).start()
        called.wait()
        time.sleep(0.02)  # meanwhile nobody has accepted what was sent to
        accepted, _ = server.accept()
        with accepted:
            accepted.recv(1)
            accepted.sendall(b"!")
        time.sleep(0.03)
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin: print(done[0], flush=True)
"""


def test_what_passes_is_waited_for(start: Start, lzy: CommandLine) -> None:
    """A connection that is not accepted yet, and has bytes in it, holds a dump up for a moment."""
    program = start(command=[sys.executable, "-c", CALLER]).await_ready()
    for name in ("one", "two"):
        lzy.dump(program, name, "--leave-running")
    lzy.dump(program)
    lzy.restore(program)
    before = int(program.ask("?"))
    deadline = time.monotonic() + PATIENCE_S
    while int(program.ask("?")) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.shows("survives", "a sleep in the kernel: as long as it would have been")
def test_sleep(start: Start, lzy: CommandLine) -> None:
    """sleep(1), which is nothing but one system call: it sleeps as long as it would have."""
    began = time.monotonic()
    program = start(command=["sleep", "3"])
    await_system_call(program)
    lzy.dump(program)
    lzy.restore(program)
    program.await_end()
    assert 2.9 <= time.monotonic() - began < PATIENCE_S


def await_system_call(program: Program) -> None:
    """Wait until the process sleeps in its kernel call, having been through its start-up."""
    deadline = time.monotonic() + PATIENCE_S
    wanted = {"35", "230"}  # nanosleep, clock_nanosleep
    while Path(f"/proc/{program.pid}/syscall").read_text().split()[0] not in wanted:
        assert time.monotonic() < deadline
        os.sched_yield()


@both_ways
@pytest.mark.shows("survives", "an ipykernel and its client")
def test_kernel_answers_the_same_client(
    lzy: CommandLine, tmp_path: Path, nothing_left_behind: None, way: tuple[str, ...]
) -> None:
    """An ipykernel is dumped (it ends) and restored; the client that it had runs the next cell."""
    from jupyter_client.manager import KernelManager

    kernel = KernelManager(kernel_name="python3", connection_file=str(tmp_path / "kernel.json"))
    with open(tmp_path / "kernel.log", "wb") as log:
        kernel.start_kernel(stdout=log, stderr=log)
    child = kernel.provisioner.process
    client = kernel.blocking_client()
    pidfds = [os.pidfd_open(child.pid)]
    try:
        client.start_channels()
        client.wait_for_ready(timeout=30)

        def run(cell: str, timeout_s: float = 30) -> str:
            heard: list[str] = []
            reply = client.execute_interactive(
                cell,
                timeout=timeout_s,
                output_hook=lambda message: heard.append(message["content"].get("text", "")),
            )
            assert reply["content"]["status"] == "ok", reply
            return "".join(heard)

        run("import numpy as np, threading; x = np.arange(1e6); g = (n * n for n in range(99))")
        assert run("print(next(g), next(g), x.sum())") == "0 1 499999500000.0\n"
        lzy.succeed("dump", str(child.pid), "--store", str(lzy.store), "--name", "kernel")
        child.wait(timeout=PATIENCE_S)
        report = lzy.succeed("restore", "kernel", "--store", str(lzy.store), *way)
        pidfds.append(os.pidfd_open(report["pid"]))
        # What is published goes nowhere until the client has subscribed anew, as after any loss of
        # the network; a message that comes through tells that it has.
        deadline = time.monotonic() + PATIENCE_S
        heard = ""
        while heard != "heard\n":
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):  # all of the answer went nowhere
                heard = run("print('heard')", timeout_s=2)
        assert run("print(next(g), next(g), x.sum())") == "4 9 499999500000.0\n"
        assert "from a child" in run("!echo from a child")
        # The kernel looks every second whether its parent is still there.
        assert not wait_readable([pidfds[-1]], 2.5), (tmp_path / "kernel.log").read_text()
        assert run("y = x[::-1].copy(); print(y[0])") == "999999.0\n"
    finally:
        client.stop_channels()
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert wait_readable([pidfd], PATIENCE_S)
            os.close(pidfd)
        child.wait()
        kernel.cleanup_resources()


def refuses(lzy: CommandLine, program: Program, *options: str) -> dict[str, Any]:
    """lzy refuses to dump the program, which then proves that nothing has happened to it."""
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store), *options)
    assert lzy.run("images", "--store", str(lzy.store), "--json").stdout.find(b'"name"') < 0
    assert program.is_alive
    assert read_state(program) in "SR"
    program.prove()
    return error


@pytest.mark.shows("refused", "an io_uring with requests in flight")
def test_uring_with_work_in_flight_is_refused(start: Start, lzy: CommandLine) -> None:
    """An io_uring with a read in flight is refused by name; the read then completes."""
    program = start("io_uring_busy").await_ready()
    error = refuses(lzy, program)
    assert error["kind"] == "unsupported"
    assert "io_uring" in error["message"]
    assert error["remedy"]


def test_traced_process_is_refused(start: Start, lzy: CommandLine) -> None:
    """A process under a debugger is refused; debugger and process go on."""
    program = start("interpreter").await_ready()
    tracer = start(command=[sys.executable, str(PROGRAMS / "tracer.py"), str(program.pid)])
    tracer.await_ready()
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
    assert str(tracer.pid) in error["message"]
    program.prove()
    tracer.prove()


def test_what_is_not_there_is_refused(start: Start, lzy: CommandLine) -> None:
    """A pid that nobody has, a process that has died, a thread of the kernel: each in words."""
    program = start(command=["true"])
    assert wait_readable([program.pidfd], PATIENCE_S)  # A zombie: we have not waited for it.
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
    assert str(program.pid) in error["message"]
    program.child.wait()
    assert lzy.fail("dump", str(program.pid), "--store", str(lzy.store))["kind"] == "not_found"
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if directory.name.isdecimal() and not os.readlink(directory / "exe"):
                break
    assert lzy.fail("dump", "2", "--store", str(lzy.store))["message"]


def test_image_name_taken(start: Start, lzy: CommandLine) -> None:
    """The name of another process's image is refused before the process is touched."""
    other, program = start("interpreter").await_ready(), start("interpreter").await_ready()
    lzy.dump(other, "image", "--leave-running")
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store), "--name", "image")
    assert "image" in error["message"]
    assert error["kind"] == "busy"
    program.prove()


@pytest.mark.parametrize("change", ["content", "gone"])
@pytest.mark.shows("refused", "a mapped file that has changed")
def test_changed_file_is_refused(start: Start, lzy: CommandLine, change: str) -> None:
    """A mapped file that is another one now is refused by name, before there is a process."""
    program = start("mapped_files", "{folder}").await_ready()
    lzy.dump(program)
    path = program.folder / "private"
    if change == "gone":
        path.rename(path.with_name("elsewhere"))
    else:
        path.write_bytes(path.read_bytes() + b"longer")
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert str(path) in error["message"]
    assert error["remedy"]
    if change == "gone":
        path.with_name("elsewhere").rename(path)
        lzy.restore(program)
        program.prove()
