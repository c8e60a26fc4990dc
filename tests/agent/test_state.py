"""The agent's database: what was written is there, with its event, or nothing of it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lzy.agent.state import HIBERNATED, HIBERNATING, RUNNING, Record, State
from lzy.checkpoint.errors import Busy, Damaged, NotFound

RECORD = Record("calm", 0, RUNNING, 1.0, 1.0, 4121, 7, "boot", "python")


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "agent" / "state.db")


def test_records_come_back_as_they_were(state: State, tmp_path: Path) -> None:
    """Every field of a record is read again as it was written, by another process too."""
    record = RECORD._replace(idle_gaps=(1.5, 2.5), settings={"doze_after_s": None})
    state.insert(record, "attached", "words", 0)
    changed = state.update(record, kind="held", words="x", hold_until_unix_s=5.5, failure="é")
    state.close()
    other = State(tmp_path / "agent" / "state.db")
    assert other.records() == [changed]
    assert [event.kind for event in other.events(0)] == ["attached", "held"]


def test_ways_between_states(state: State) -> None:
    """A session goes only from states to those that follow them; since when is written down."""
    state.insert(RECORD, "attached", "", 0)
    with pytest.raises(ValueError, match="cannot go from running to waking"):
        state.update(RECORD, state="waking")
    record = state.update(RECORD, state=HIBERNATING, intent="hibernate")
    assert record.since_unix_s > RECORD.since_unix_s
    assert state.update(record, state=HIBERNATED, intent="").state == HIBERNATED


def test_a_name_is_one_sessions(state: State) -> None:
    """A second session of a name is refused, and leaves no event; one that is gone is missed."""
    state.insert(RECORD, "attached", "", 0)
    with pytest.raises(Busy):
        state.insert(RECORD, "attached", "", 0)
    state.remove(RECORD, "", 0)
    with pytest.raises(NotFound):
        state.update(RECORD, kind="held", failure="x")
    assert [event.kind for event in state.events(0)] == ["attached", "detached"]


def test_a_writer_that_is_killed_leaves_all_or_nothing(state: State, tmp_path: Path) -> None:
    """kill -9 between the two halves of a change: neither is there."""
    state.insert(RECORD, "attached", "", 0)
    path = tmp_path / "agent" / "state.db"
    child = os.fork()
    if child == 0:
        other = State(path)
        other._tell = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]  # killed in its midst
        other.update(RECORD, kind="held", hold_until_unix_s=9.0)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert state.records() == [RECORD]
    assert [event.kind for event in state.events(0)] == ["attached"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A file that is no database, or of another version, is named; nothing is written to it."""
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, whatever it is called" * 100)
    with pytest.raises(Damaged, match="no database"):
        State(path)
    assert path.read_bytes().startswith(b"not a database")


def test_events_are_told_in_order_and_bounded(state: State) -> None:
    """Those after a number, of one session or of all."""
    state.insert(RECORD, "attached", "", 0)
    for number in range(5):
        state.tell("other", 0, "set", str(number))
    assert [event.words for event in state.events(3)] == ["2", "3", "4"]
    assert [event.session for event in state.events(0, session="calm")] == ["calm"]
    assert len(state.events(state.last_event(before=2))) == 2
