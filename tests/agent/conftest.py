"""Fixtures of the agent's tests: a service with a home of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from living import CommandLine
from pair import Pair
from service import Service


@pytest.fixture
def service(lzy: CommandLine) -> Iterator[Service]:
    """No agent yet: `service.begin()` or `lzy.run("up")` starts one for the home of `lzy`."""
    made = Service(lzy.home)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pair(tmp_path: Path, nothing_left_behind: None) -> Iterator[Pair]:
    """Two agents of one fleet, not started yet."""
    made = Pair(tmp_path)
    try:
        yield made
    finally:
        made.close()
