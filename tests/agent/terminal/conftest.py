"""Fixtures of the tests of terminals: people, and keepers that end with the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import CommandLine
from people import Terminals
from service import Service


@pytest.fixture
def terminals(lzy: CommandLine, service: Service) -> Iterator[Terminals]:
    made = Terminals(lzy, service)
    try:
        yield made
    finally:
        service.close()  # the agent first: it would wake who has something to read
        made.close()
