"""`lzy simulate`, from the outside."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

SMALL = ("--users", "3", "--days", "2")


def _complete(lzy: Run, line: str) -> list[str]:
    words = line.split(" ")
    answer = lzy(_LZY_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return [offer.partition(",")[2] for offer in answer.stdout.split()]


def test_it_tells_of_three_policies(lzy: Run) -> None:
    """A table with a column for each, and a picture of a week for each, in a few seconds."""
    answer = lzy("simulate", *SMALL)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    head = next(line for line in lines if "always on" in line)
    assert [name.strip() for name in head.split("  ") if name][-3:] == [
        "lzy",
        "idle timeout",
        "always on",
    ]
    assert any(line.startswith("utilisation") and line.count("%") == 3 for line in lines)
    assert answer.stdout.count("100 %") >= 3
    assert answer.stdout.count("│Mon") == 3
    assert answer.stderr == ""


def test_json_has_a_unit_in_every_key(lzy: Run) -> None:
    """One document, the same every time but for the time that it took."""
    documents = []
    for _ in range(2):
        answer = lzy("simulate", *SMALL, "--json")
        assert answer.returncode == 0, answer.stderr
        document = json.loads(answer.stdout)
        assert document.pop("total_s") > 0
        documents.append(document)
    assert documents[0] == documents[1]
    assert (documents[0]["users"], documents[0]["days"], documents[0]["seed"]) == (3, 2, 1)
    lzy_s, culler, on = documents[0]["policies"]
    assert [lzy_s["name"], culler["name"], on["name"]] == ["lzy", "idle timeout", "always on"]
    assert 0 < on["utilisation"] < lzy_s["utilisation"] <= 1
    assert lzy_s["held_s"] >= lzy_s["running_s"] >= lzy_s["computing_s"] > 0
    assert len(lzy_s["utilisation_by_hour"]) == 168
    assert {"kind", "on_s", "most_at_once"} == set(lzy_s["nodes"][0])


def test_a_written_trace_gives_the_same_figures(lzy: Run, tmp_path: Path) -> None:
    """`--write-trace` makes the file that a later run reads, as it would read a recorded one."""
    made = lzy("simulate", *SMALL, "--write-trace", "two.jsonl", "--json")
    assert made.returncode == 0, made.stderr
    lines = (tmp_path / "two.jsonl").read_text().splitlines()
    assert json.loads(made.stdout)["events"] == len(lines) - 1
    answer = lzy("simulate", "two.jsonl", "--json")
    assert answer.returncode == 0, answer.stderr
    of_file = json.loads(answer.stdout)
    of_users = json.loads(lzy("simulate", *SMALL, "--json").stdout)
    assert of_file["trace"] == "two.jsonl"
    assert of_file["users"] is None
    for one, other in zip(of_file["policies"], of_users["policies"], strict=True):
        assert one["computing_s"] == pytest.approx(other["computing_s"], rel=0.02)


def test_the_picture_is_svg(lzy: Run, tmp_path: Path) -> None:
    """A file that a browser shows, with every policy by its name."""
    assert lzy("simulate", *SMALL, "--svg", "week.svg").returncode == 0
    root = ElementTree.parse(tmp_path / "week.svg").getroot()
    assert root.tag.endswith("svg")
    words = {element.text for element in root.iter() if element.text}
    assert {"lzy", "idle timeout", "always on", "Mon", "Sun"} <= words


def test_settings_change_what_it_tells(lzy: Run) -> None:
    """With nothing ever taken, lzy is always on; who dozes sooner wastes less."""

    def utilisation(*options: str) -> float:
        answer = lzy("simulate", *SMALL, "--json", *options)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)["policies"][0]["utilisation"]

    never = ("--doze-after", "never", "--hibernate-after", "never", "--gpu-back-after", "never")
    on = json.loads(lzy("simulate", *SMALL, "--json").stdout)["policies"][2]["utilisation"]
    assert utilisation(*never) == pytest.approx(on, rel=0.02)
    assert utilisation("--doze-after", "1min") > utilisation("--no-adapt")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["none.jsonl"], 3, "no trace none.jsonl"),
        (["none.jsonl", "--users", "3"], 2, "Give either a TRACE"),
        (["x", "--write-trace", "y"], 2, "Give either a TRACE"),
        (["--users", "0"], 2, "--users"),
        (["--doze-after", "soon"], 2, "'soon' is no time"),
        (["--fleet", "small"], 2, "how many CPUs"),
        (["bad.jsonl"], 6, "bad.jsonl, line 2"),
        (["bad.jsonl", "--json"], 6, "bad.jsonl, line 2"),
        ([".", "--json"], 10, "Is a directory"),
        ([*SMALL, "--svg", "none/x.svg"], 10, "none/x.svg"),
    ],
)
def test_mistakes_are_told(
    lzy: Run, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    """Each with the exit status of its kind, and what is wrong where."""
    (tmp_path / "bad.jsonl").write_text('{"trace": "lzy", "version": 1}\n{"at_s": "x"}\n')
    answer = lzy("simulate", *arguments)
    assert answer.returncode == status, answer.stderr
    assert words in answer.stderr
    if "--json" in arguments:
        assert json.loads(answer.stdout)["error"]["exit_status"] == status


def test_tab_completes(lzy: Run) -> None:
    """Options, times and an example of a fleet."""
    assert "--write-trace" in _complete(lzy, "lzy simulate --")
    assert _complete(lzy, "lzy simulate --doze-after 5") == ["5min"]
    assert _complete(lzy, "lzy simulate --fleet small:")[0].startswith("small:2cpu")
