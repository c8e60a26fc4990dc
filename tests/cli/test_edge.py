"""What a person sees when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from lzy.checkpoint import errors
from lzy.cli import app, edge

Run = Callable[..., subprocess.CompletedProcess[str]]


def _run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    @click.command()
    @click.option("--json", is_flag=True)
    def stand_in(json: bool) -> None:
        raise error

    monkeypatch.setattr(app.CommandsByName, "get_command", lambda *_: stand_in)
    with pytest.raises(SystemExit) as ended:
        edge.run(["stand-in", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound("there is no image calm", remedy="`lzy images` lists them", image="calm"),
        errors.Unsupported("process 7 has an io_uring with work in flight", remedy="wait for it"),
        errors.AccessDenied("cannot seize pid 7: EPERM", remedy="run as root"),
        errors.Damaged("pack 3 is not what was written"),
        errors.Incompatible("this CPU lacks amx_tile"),
        errors.Busy("the name calm is taken", remedy="choose another"),
        errors.StoreUnavailable("no space left in /data"),
        errors.KernelError("cannot map 0x7f00", 12),
        errors.LzyError("something else"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_a_line_and_a_way_out(
    error: errors.LzyError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An LzyError is told without a traceback, and its exit status is its kind's."""
    assert _run_raising(error, monkeypatch) == error.exit_status
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == f"lzy: error: {error.message}"
    assert lines[1:] == ([f"what to do: {error.remedy}"] if error.remedy else [])
    assert said.out == ""


def test_an_error_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json the error is a document on stdout too, with its facts."""
    error = errors.StoreUnavailable("disk full", remedy="lzy gc", path=Path("/data"), free_bytes=7)
    assert _run_raising(error, monkeypatch, "--json") == 9
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "kind": "store_unavailable",
            "message": "disk full",
            "remedy": "lzy gc",
            "exit_status": 9,
            "facts": {"path": "/data", "free_bytes": 7},
        }
    }


def test_a_defect_of_lzy_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody raised on purpose keeps its traceback."""

    @click.command()
    def stand_in() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.CommandsByName, "get_command", lambda *_: stand_in)
    with pytest.raises(ZeroDivisionError):
        edge.run(["stand-in"])


def test_an_interrupt_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends with 130, as in a shell, and what the command has to say about it."""
    assert _run_raising(edge.Interrupted("interrupted; process 7 runs on"), monkeypatch) == 130
    assert "process 7 runs on" in capsys.readouterr().err
    assert _run_raising(KeyboardInterrupt(), monkeypatch) == 130


def test_a_reader_that_went_away_is_no_error(tmp_path: Path) -> None:
    """`lzy … | head -1` ends quietly."""
    command = [sys.executable, "-c", "from lzy.cli import main; main()", "doctor", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        command,
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "LZY_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
        timeout=60,
    )
    os.close(writer)
    assert ended.stderr == b""
    assert ended.returncode == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_are_no_error(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """`lzy … >&-` does its work, and none of its own files gets a standard number."""
    code = (
        "import os; from lzy.cli import main\n"
        "try: main()\n"
        "except SystemExit as e:\n"
        "    assert all(map(os.fstat, (0, 1, 2))); os._exit(e.code)"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    ended = subprocess.run(
        [sys.executable, "-c", code, "completion", "bash"],
        env={**os.environ, "LZY_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=close,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert bool(ended.stdout) == (1 not in closed)


@pytest.mark.parametrize("arguments", [["images"], ["show", "calm"], ["restore"], ["verify", "x"]])
def test_no_store_is_told(lzy: Run, arguments: list[str], tmp_path: Path) -> None:
    """Without a store, reading commands say that there is none and make none."""
    store = tmp_path / "nowhere"
    answer = lzy(*arguments, "--store", str(store))
    assert answer.returncode == errors.NotFound.exit_status, answer.stderr
    assert answer.stderr.startswith("lzy: error: ")
    assert str(store) in answer.stderr
    assert not store.exists()
