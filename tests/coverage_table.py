"""docs/coverage.md, made from the tests themselves: what survives, what is cut, what is refused.

Programs of the zoo are those that a test names by `Case("name", …)`; their docstrings say what
they hold. Everything else is a test that says of itself what it shows:
`@pytest.mark.shows("refused", "what")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "coverage.md"
OUTCOMES = {
    "survives": "also survives, as these tests show of single things",
    "changed": "comes back as something else",
    "cut": "is cut, as when a network or a neighbour fails",
    "refused": "is refused by name, with a way out, and nothing is done",
}

_HEAD = """\
# What survives, what is cut, what is refused

Made from the tests by `LZY_WRITE_COVERAGE=1 pytest tests/test_coverage.py`; a test compares. Kinds
of descriptors one by one are in [descriptors.md](descriptors.md), promises in
[guarantees.md](guarantees.md).

## Programs that are dumped in mid-life and restored

Each sets up what it holds, is dumped, which ends it, is restored eagerly and lazily, and then
proves its state. Without lzy, and with its state spoiled, the proof must fail.

| program | holds |
|---|---|
"""


class Shown(NamedTuple):
    """What a test says that it shows."""

    outcome: str
    what: str
    test: str


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(TESTS.rglob("test_*.py")):
        yield path.relative_to(TESTS.parent).as_posix(), ast.parse(path.read_text())


def find_programs() -> dict[str, str]:
    """The programs (with arguments) of all cases, and the first paragraph of their docstrings."""
    found: dict[str, str] = {}
    for _, module in _modules():
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Case":
                values = [ast.literal_eval(argument) for argument in call.args]
                arguments = [word for word in (values[1] if values[1:] else ()) if "{" not in word]
                text = (TESTS / "programs" / f"{values[0]}.py").read_text()
                said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
                found[" ".join([values[0], *arguments])] = " ".join(said.split())
    return found


def find_shown() -> list[Shown]:
    """What tests say of themselves by `pytest.mark.shows`."""
    found = []
    for path, module in _modules():
        for function in ast.walk(module):
            if not isinstance(function, ast.FunctionDef):
                continue
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "shows":
                    outcome, what = (ast.literal_eval(argument) for argument in mark.args)
                    found.append(Shown(outcome, what, f"{path} -k {function.name}"))
    return sorted(found, key=lambda shown: shown.what.lower())


def make_page() -> str:
    """The whole text of docs/coverage.md."""
    text = _HEAD
    for name, holds in sorted(find_programs().items()):
        text += f"| `{name}` | {holds} |\n"
    for outcome, words in OUTCOMES.items():
        rows = [shown for shown in find_shown() if shown.outcome == outcome]
        text += f"\n## What {words}\n\n| what | test |\n|---|---|\n"
        for shown in rows:
            text += f"| {shown.what} | `{shown.test}` |\n"
    return text
