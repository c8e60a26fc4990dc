"""How the tests of the commands run them: as a person does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lzy(tmp_path: Path) -> Run:
    """Run `lzy ARGUMENTS`, with a home of its own; keyword arguments are environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from lzy.cli import main; main()", *arguments],
            env={**os.environ, "LZY_HOME": str(tmp_path / "home"), **environment},
            cwd=tmp_path,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    return run
