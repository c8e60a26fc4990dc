"""docs/coverage.md says what the tests say."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from coverage_table import OUTCOMES, PAGE, TESTS, find_programs, find_shown, make_page


def test_page_is_what_the_tests_say() -> None:
    """The committed page is the one made from the tests; LZY_WRITE_COVERAGE=1 writes it anew."""
    page = make_page()
    if os.environ.get("LZY_WRITE_COVERAGE"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run: LZY_WRITE_COVERAGE=1 pytest tests/test_coverage.py"


def test_every_program_is_somewhere() -> None:
    """No program lies about unused: each is a case of the zoo, or a test starts it by its name."""
    cases = {name.split()[0] for name in find_programs()}
    texts = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    for path in (TESTS / "programs").glob("*.py"):
        if "import converse" in path.read_text() or ", converse" in path.read_text():
            assert path.stem in cases or f'"{path.stem}' in texts, path.stem


def test_every_outcome_is_known() -> None:
    """A mark with a misspelt outcome would be in no table."""
    assert {shown.outcome for shown in find_shown()} == set(OUTCOMES)
    assert all(find_programs().values())
