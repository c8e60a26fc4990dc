"""`lzy show --variables` and `lzy dump --trim`, as a person calls them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from living import PATIENCE_S, CommandLine, wait_readable

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

#: It has a table and much garbage, and answers lines; `compute` keeps it busy until it is told.
SUBJECT = """
import gc, select, sys
gc.disable()
class Node: pass
def make():
    for n in range(100_000):
        node = Node(); node.me = node; node.data = bytes(200)
make()
table = [bytes(1000) for n in range(5000)]
escape = {"\\x1b[2J": 1}
globals()["odd \\x1b[31m"] = 1
print("ready", flush=True)
for line in sys.stdin:
    if line == "compute\\n":
        print("computing", flush=True)
        while not select.select([0], [], [], 0)[0]: sum(range(1000))
    else:
        print(len(table), flush=True)
"""


@pytest.fixture
def lzy(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "home")


@pytest.fixture
def subject(start: Start) -> Program:
    return start(command=[sys.executable, "-c", SUBJECT]).await_ready()


def test_variables_of_a_living_process(lzy: CommandLine, subject: Program) -> None:
    """Largest first, in words and as a document; names from elsewhere cannot paint the terminal."""
    done = lzy.run("show", str(subject.pid), "--variables")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0].split()[:2] == ["process", f"{subject.pid},"]
    row = next(line for line in lines if "table" in line)
    assert "4.97 MiB" in row
    assert "5,000 items" in row
    assert b"\x1b" not in done.stdout
    document = lzy.succeed("show", str(subject.pid), "--variables")
    assert document["pid"] == subject.pid
    assert document["variables"][0]["name"] == "table"
    assert document["resident_bytes"] > document["bytes"] > 5_000_000
    assert subject.ask("go on") == "5000"


def test_trim_is_recorded(lzy: CommandLine, subject: Program) -> None:
    """A trimmed dump is smaller, says what it gave back, and its image lists the variables."""
    whole = lzy.dump(subject, "whole", "--leave-running", "--no-track")
    trimmed = lzy.dump(subject, "trimmed", "--trim")
    assert trimmed["raw_bytes"] < whole["raw_bytes"] - (20 << 20)
    assert any(note.startswith("trimmed: ") for note in trimmed["notes"])
    store = ("--store", str(lzy.store))
    document = lzy.succeed("show", "trimmed", "--variables", *store)
    assert document["image"] == "trimmed"
    assert document["variables"][0]["name"] == "table"
    error = lzy.fail("show", "whole", "--variables", *store)
    assert error["kind"] == "not_found"
    assert "lzy dump --trim" in error["remedy"]
    lzy.restore(subject, "trimmed")
    assert subject.ask("go on") == "5000"


def test_who_is_busy_is_dumped_untrimmed(lzy: CommandLine, subject: Program) -> None:
    """A process that computes is not asked: a note says so, and the dump goes on."""
    assert subject.ask("compute") == "computing"
    report = lzy.dump(subject, "image", "--trim", "--leave-running")
    assert any("not trimmed" in note and "busy" in note for note in report["notes"])
    error = lzy.fail("show", str(subject.pid), "--variables", "--store", str(lzy.store))
    assert error["kind"] == "busy"
    assert subject.ask("go on") == "5000"


def test_what_is_no_python(lzy: CommandLine, start: Start) -> None:
    """A shell has no variables to list, and is dumped as it is."""
    program = start(command=["bash", "--norc", "-c", "echo ready; read; echo $REPLY"])
    program.await_ready()
    error = lzy.fail("show", str(program.pid), "--variables")
    assert error["kind"] == "unsupported"
    report = lzy.dump(program, "image", "--trim", "--leave-running")
    assert any("runs no CPython" in note for note in report["notes"])
    assert program.ask("word") == "word"
    program.await_end()
    assert lzy.fail("show", str(program.pid), "--variables")["kind"] == "not_found"


def test_a_kernel_between_two_cells(
    lzy: CommandLine, tmp_path: Path, nothing_left_behind: None
) -> None:
    """An idle notebook kernel lists what was typed and its outputs, and does not notice."""
    from jupyter_client.manager import KernelManager

    kernel = KernelManager(kernel_name="python3", connection_file=str(tmp_path / "kernel.json"))
    with open(tmp_path / "kernel.log", "wb") as log:
        kernel.start_kernel(stdout=log, stderr=log)
    child = kernel.provisioner.process
    client = kernel.blocking_client()
    pidfd = os.pidfd_open(child.pid)
    try:
        client.start_channels()
        client.wait_for_ready(timeout=30)

        def run(cell: str) -> str:
            heard: list[str] = []

            def hear(message: dict[str, Any]) -> None:
                content = message["content"]
                heard.append(
                    content.get("text", "") or content.get("data", {}).get("text/plain", "")
                )

            reply = client.execute_interactive(cell, timeout=30, output_hook=hear)
            assert reply["content"]["status"] == "ok", reply
            return "".join(heard)

        run("import numpy as np; import sys, threading; array = np.ones(3_000_000); same = array")
        run("array + 1")
        run("text = 'x' * 1000; text")
        state = (
            "sorted(k for k in globals() if k[0] != '_'), _, len(Out), len(threading.enumerate())"
        )
        before = run(f"print({state})")
        document = lzy.succeed("show", str(child.pid), "--variables")
        rows = {row["name"]: row for row in document["variables"]}
        assert [row["name"] for row in document["variables"][:2]] == ["Out[2]", "array"]
        assert 24_000_000 <= rows["array"]["bytes"] < 24_001_000
        assert rows["array"]["what"] == "3000000 float64"
        assert rows["same"]["same_as"] == "array"
        assert rows["Out[3]"]["same_as"] == "text"
        assert document["bytes"] < 49_000_000
        assert not {"In", "_", "_2", "_i", "exit", "get_ipython", "np"} & rows.keys()
        assert run(f"print({state})") == before
        for number in range(3):
            report = lzy.succeed(
                "dump", str(child.pid), "--store", str(lzy.store), "--name", f"kernel{number}",
                "--trim", "--leave-running", "--no-track",
            )  # fmt: skip
            assert any(note.startswith("trimmed: ") for note in report["notes"]), report
        assert run(f"print({state})") == before
        assert run("int(array.sum())") == "3000000"
    finally:
        client.stop_channels()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert wait_readable([pidfd], PATIENCE_S)
        os.close(pidfd)
        child.wait()


def test_a_prompt_goes_on_where_it_was(lzy: CommandLine, tmp_path: Path) -> None:
    """An interpreter at its prompt, on a terminal, is asked while half a line is typed."""
    import pexpect

    prompt = pexpect.spawn(
        sys.executable,
        ["-q"],
        env={**os.environ, "PYTHON_HISTORY": str(tmp_path / "h")},
        timeout=30,
    )
    try:
        prompt.expect(">>> ")
        prompt.sendline("numbers = list(range(1000)); 6 * 7")
        prompt.expect("42\r\n")
        prompt.expect(">>> ")
        prompt.send("len(num")
        deadline = time.monotonic() + PATIENCE_S
        while True:  # until it has taken in what was typed and waits for more
            done = lzy.run("show", str(prompt.pid), "--variables", "--json")
            if done.returncode == 0:
                break
            assert time.monotonic() < deadline, done.stderr
        assert b'"name": "numbers"' in done.stdout
        prompt.sendline("bers), _")
        prompt.expect(r"\(1000, 42\)")
    finally:
        prompt.close(force=True)


def test_help_names_both(lzy: CommandLine) -> None:
    """The help of both commands tells of them."""
    assert b"--trim" in lzy.run("dump", "--help").stdout
    assert b"--variables" in lzy.run("show", "--help").stdout
