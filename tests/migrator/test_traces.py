"""Traces: made ones look like what was measured, and files say where they are wrong."""

from __future__ import annotations

import io
import itertools
import statistics
from pathlib import Path

import pytest

from lzy.migrator.traces import BUSY, DAY_S, END, START, Event, make_trace, read_trace, write_trace


def test_equal_seeds_make_equal_traces() -> None:
    """And other seeds other ones; more users leave those there were as they are."""
    made = list(make_trace(5, 3, 1))
    assert made == list(make_trace(5, 3, 1))
    assert made != list(make_trace(5, 3, 2))
    more = [event for event in make_trace(6, 3, 1) if event.user < 5]
    assert more == made


def test_a_made_trace_is_in_order_and_whole() -> None:
    """Sessions start once, before they compute, end once, and compute nothing after that."""
    began: set[str] = set()
    ended: set[str] = set()
    before_s = 0.0
    for event in make_trace(20, 8, 3):
        assert before_s <= event.at_s < 8 * DAY_S
        before_s = event.at_s
        if event.kind == START:
            assert event.session not in began
            began.add(event.session)
        else:
            assert event.session in began
            assert event.session not in ended
        if event.kind == END:
            ended.add(event.session)
        if event.kind == BUSY:
            assert event.duration_s > 0
            assert event.memory_bytes >= 2**28
    assert ended
    assert began - ended


def test_gpu_tasks_last_as_long_as_was_measured() -> None:
    """Half of them at most two minutes, three quarters at most five (NotebookOS, AdobeTrace)."""
    tasks = [e.duration_s for e in make_trace(150, 5, 1) if e.kind == BUSY and e.gpu]
    assert len(tasks) > 1000
    quarters = statistics.quantiles(tasks, n=4)
    assert quarters[1] == pytest.approx(120, rel=0.15)
    assert quarters[2] == pytest.approx(300, rel=0.2)


def test_pauses_are_heavy_tailed() -> None:
    """Most pauses are a minute, yet those beyond ten minutes make up a good part of the time."""
    ends: dict[str, float] = {}
    pauses = []
    for event in make_trace(40, 5, 1):
        if event.kind == BUSY:
            if event.session in ends:
                pauses.append(event.at_s - ends[event.session])
            ends[event.session] = event.at_s + event.duration_s
    within_a_day = [pause for pause in pauses if pause < 4 * 3600]
    assert 30 < statistics.median(within_a_day) < 120
    assert sum(pause for pause in within_a_day if pause > 600) > 0.2 * sum(within_a_day)


def test_nights_and_weekends_are_quiet() -> None:
    """Users of one time zone compute by day, on working days; some leave work over night."""
    hours = [0] * 7 * 24
    for event in make_trace(100, 7, 1):
        if event.kind == BUSY:
            hours[int(event.at_s // 3600)] += 1
    days = [sum(hours[day * 24 : day * 24 + 24]) for day in range(7)]
    assert min(days[:5]) > 4 * max(days[5:])
    assert hours[12] > 5 * hours[23]


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    """Written and read, a trace is the same to the millisecond."""
    made = list(itertools.islice(make_trace(5, 2, 1), 500))
    path = tmp_path / "trace.jsonl"
    assert write_trace(path, made) == 500
    with path.open() as file:
        back = list(read_trace(file, "trace"))
    for one, other in zip(made, back, strict=True):
        assert one._replace(at_s=0, duration_s=0) == other._replace(at_s=0, duration_s=0)
        assert one.at_s == pytest.approx(other.at_s, abs=1e-3)
        assert one.duration_s == pytest.approx(other.duration_s, abs=1e-3)


HEAD = '{"trace": "lzy", "version": 1}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no events"),
        (HEAD, "no events"),
        ("hello\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"at_s": 1}\n', "line 1 is not the head of a trace"),
        ('{"trace": "lzy", "version": 9}\n', "version 9, this lzy reads 1"),
        (HEAD + "\n", "line 2 is not JSON"),
        (HEAD + '{"at_s": 1, "event": "sleep", "session": "a"}\n', "event is 'sleep'"),
        (HEAD + '{"at_s": 1, "event": "start"}\n', "session is None"),
        (HEAD + '{"at_s": -1, "event": "start", "session": "a"}\n', "at_s is -1"),
        (HEAD + '{"at_s": NaN, "event": "start", "session": "a"}\n', "at_s is nan"),
        (HEAD + '{"at_s": true, "event": "start", "session": "a"}\n', "at_s is True"),
        (HEAD + '{"at_s": 1, "event": "busy", "session": "a"}\n', "duration_s is None"),
        (
            HEAD
            + '{"at_s": 2, "event": "start", "session": "a"}\n'
            + '{"at_s": 1, "event": "end", "session": "a"}\n',
            "line 3 is earlier than the one before",
        ),
    ],
)
def test_a_file_that_is_no_trace_is_told_by_its_line(text: str, words: str) -> None:
    """The name of the file, the number of the line, and what is wrong there."""
    with pytest.raises(ValueError, match="mine") as raised:
        list(read_trace(io.StringIO(text), "mine"))
    assert words in str(raised.value)


def test_what_a_trace_may_leave_out() -> None:
    """Users, memory and GPUs are 0 where a line does not tell them."""
    line = '{"at_s": 1, "event": "busy", "session": "a", "duration_s": 2.5}\n'
    assert list(read_trace(io.StringIO(HEAD + line), "t")) == [Event(1, BUSY, "a", 0, 2.5)]
