"""Monotonic and boot-time clocks of a process that comes back on another boot of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lzy.checkpoint.dump import dump
from lzy.checkpoint.image import Image
from lzy.checkpoint.restore import restore
from lzy.checkpoint.store import Store

PROGRAM = """
import sys, time
print("ready", flush=True)
while True:
    with open(sys.argv[1] + "/ask") as ask:
        ask.read()
    answer = [time.clock_gettime_ns(c) for c in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)]
    with open(sys.argv[1] + "/answer", "w") as file:
        print(*answer, file=file)
"""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """The image of a program that tells its clocks through two named pipes."""
    os.mkfifo(tmp_path / "ask")
    os.mkfifo(tmp_path / "answer")
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        with Store.open(tmp_path / "store", create=True) as store:
            dump(child.pid, store, name="clocks")
            child.wait(60)
            loaded = store.load("clocks")
        yield loaded
        loaded.close()
    finally:
        child.kill()
        child.wait(60)
        if child.stdout:
            child.stdout.close()


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_clocks_go_on_after_another_boot(image: Image, tmp_path: Path, namespace: str) -> None:
    """Both clocks stood higher when the image was taken: they go on from there, each by itself."""
    host = image.document["host"]
    host["boot_id"] = "another"
    host["monotonic_ns"] += 5_000 * 10**9
    host["boottime_ns"] += 7_000 * 10**9
    began = time.monotonic_ns()
    report = restore(image, eager=True, pid_namespace=namespace)
    pidfd = os.pidfd_open(report.pid)
    try:
        (tmp_path / "ask").write_text("now")
        monotonic, boottime = map(int, (tmp_path / "answer").read_text().split())
    finally:
        os.kill(report.pid, 9)
        if namespace == "host":
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
    passed = time.monotonic_ns() - began
    assert 0 <= monotonic - host["monotonic_ns"] <= passed
    assert 0 <= boottime - host["boottime_ns"] <= passed
