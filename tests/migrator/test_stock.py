"""Fleets in words, and nodes that are switched on and off."""

from __future__ import annotations

import pytest

from lzy.migrator.stock import DEFAULT_FLEET, Kind, Stock, parse_fleet

GIB = 2**30


def test_a_fleet_in_words() -> None:
    """CPUs and memory must be told; GPUs, number and price may be, in any order."""
    assert parse_fleet("small:1cpu:2G, gpu:2cpu:8GiB:1gpu:x3:$1.5/h") == [
        Kind("small", 1, 2 * GIB),
        Kind("gpu", 2, 8 * GIB, 1, 3, 1.5),
    ]
    assert parse_fleet("a:0.5CPU:512M:0.08") == [Kind("a", 0.5, GIB // 2, 0, 1, 0.08)]
    assert len(parse_fleet(DEFAULT_FLEET)) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no name"),
        ("small", "how many CPUs"),
        ("small:2cpu", "how much memory"),
        ("small:2cpu:8Q", "'8Q'"),
        ("small:2cpu:8G,small:1cpu:1G", "twice"),
        ("2cpu:8G", "no name"),
        ("small:0cpu:8G", "nothing to give"),
        ("small:2cpu:8G:x0", "nothing to give"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    """With the part that is wrong."""
    with pytest.raises(ValueError, match=words):
        parse_fleet(text)


def test_nodes_are_on_while_sessions_live_there_and_a_little_longer() -> None:
    """Ten minutes after the last session has left, a node is off; its hours are counted."""
    stock = Stock(parse_fleet("a:1cpu:1G:x2:2.0/h"), 600.0, 40.0, 0)
    assert [(one.name, one.warm) for one in stock.nodes(0.0)] == [("a-1", False)]
    assert stock.take("a-1", 0.0).ready_s == 40
    assert [(one.name, one.warm) for one in stock.nodes(1.0)] == [("a-1", True), ("a-2", False)]
    stock.take("a-2", 10.0)
    assert len(stock.nodes(11.0)) == 2  # no third one
    stock.leave("a-1", 3600.0)
    assert stock.take("a-1", 4100.0).ready_s == 40  # it was still on
    stock.leave("a-1", 7200.0)
    assert [(one.name, one.warm) for one in stock.nodes(7900.0)] == [("a-2", True), ("a-1", False)]
    stock.leave("a-2", 7900.0)
    stock.settle(9000.0)
    assert stock.hours["a"] == pytest.approx((7800 + 8490) / 3600)
    assert stock.cost() == pytest.approx(2 * (7800 + 8490) / 3600)
    assert stock.most == {"a": 2}


def test_a_spare_node_is_always_on() -> None:
    """Who comes next finds an empty node running; nodes with GPUs are too dear for that."""
    stock = Stock(parse_fleet("a:1cpu:1G:x3:1/h,g:1cpu:1G:1gpu:x3:9/h"), 600.0, 40.0, 1)
    assert [(one.name, one.warm) for one in stock.nodes(0.0)] == [
        ("a-1", True),
        ("a-2", False),
        ("g-1", False),
    ]
    assert stock.take("a-1", 5.0).ready_s == 0
    assert stock.on["a-2"].ready_s == 45  # the next spare one is being started
    stock.settle(3605.0)
    assert stock.hours == {"a": pytest.approx((3605 + 3600) / 3600), "g": 0}
