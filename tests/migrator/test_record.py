"""Decisions with their facts, as JSON, and made again from it."""

from __future__ import annotations

import json

import pytest
from fleets import NOW_S, briefly, fleets, idle, node
from hypothesis import given

from lzy.migrator.facts import NEVER_S, Fleet, Settings
from lzy.migrator.policy import decide
from lzy.migrator.record import read_record, replay, write_record

RULES = Settings(
    doze_after_s=60.0,
    hibernate_after_s=NEVER_S,
    per_user={1000: {"doze_after_s": NEVER_S}},
    per_session={"s1": {"hibernate_after_s": 60.0}},
)


@briefly
@given(fleets(RULES))
def test_a_record_replays_to_the_same_decisions(fleet: Fleet) -> None:
    """Facts, settings and decisions survive JSON unchanged, and the rules decide the same again."""
    found = decide(fleet, RULES, NOW_S)
    line = write_record(fleet, RULES, NOW_S, found)
    assert "\n" not in line
    assert "Infinity" not in line  # strict JSON: another language may read it
    assert read_record(line) == (fleet, RULES, NOW_S, found)
    assert replay(line) == found


def test_a_rule_that_has_changed_shows_in_a_replay() -> None:
    """A replay decides by the facts in the record, not by the decisions in it."""
    fleet = Fleet((node(),), (idle(),))
    document = json.loads(write_record(fleet, Settings(), NOW_S, decide(fleet, Settings(), NOW_S)))
    document["fleet"]["sessions"][0]["hold_until_s"] = NOW_S + 1
    assert replay(json.dumps(document)) == []


@pytest.mark.parametrize("line", ["{}", "[]", '{"version": 99}', "x", '{"version": 1}'])
def test_what_is_no_record_is_refused(line: str) -> None:
    """With a ValueError, whatever is wrong."""
    with pytest.raises(ValueError):  # noqa: PT011 - json's own says it for broken JSON
        read_record(line)
