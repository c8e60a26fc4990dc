"""Real programs are dumped in mid-life and restored; then each is asked to prove its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from conftest import CommandLine, Program

    Start = Callable[..., Program]


class Case(NamedTuple):
    """A program and its arguments (`{folder}` is a folder of its own)."""

    name: str
    arguments: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        words = [word for word in self.arguments if "{" not in word]
        return "-".join([self.name, *words])


QUICK = [
    Case("asyncio_streams"),
    Case("generators"),
    Case("heap"),
    Case("locks"),
    Case("mapped_files", ("{folder}",)),
    Case("memory_pattern"),
    Case("numpy_threads"),
    Case("sqlite_transaction", ("{folder}/base", "delete")),
    Case("sqlite_transaction", ("{folder}/base", "wal")),
    Case("stacks"),
]
# Their imports take seconds, so they are dumped once or twice.
HEAVY = [Case("pandas_frame"), Case("sklearn_fit"), Case("torch_autograd")]
ALL = [*QUICK, *HEAVY]

every_program = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
quick_programs = pytest.mark.parametrize("case", QUICK, ids=lambda case: case.id)


@every_program
def test_proof_can_fail(start: Start, case: Case) -> None:
    """Without any dump the proof holds, and it fails once the program has spoiled its own state."""
    program = start(case.name, *case.arguments).await_ready()
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


@pytest.mark.parametrize("way", ["eager", "lazy"])
@every_program
def test_restored_program_proves_its_state(
    start: Start, lzy: CommandLine, case: Case, way: str
) -> None:
    """Dumped in mid-life (which ends it) and restored, a program goes on as if nothing had been."""
    program = start(case.name, *case.arguments).await_ready()
    lzy.dump(program)
    lzy.restore(program, "image", *(["--eager"] if way == "eager" else []))
    program.prove()
    assert program.ask("ping") == "pong"
