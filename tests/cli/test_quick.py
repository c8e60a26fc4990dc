"""The quick way to `lzy restore` against click, which has the say."""

from __future__ import annotations

import inspect

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lzy.cli import quick
from lzy.cli.restore import restore
from lzy.cli.restoring import restore_image

WORDS = [
    *quick.FLAGS,
    *quick.VALUES,
    *(f"{name}=x" for name in quick.VALUES),
    *("--pid-namespace=new", "host", "auto", "calm", "", "-", "--", "-h", "--help", "--eage"),
    *("--eager=1", "--stdin=", "x=y", "--=", "-x"),
]


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_the_quick_way_agrees_with_click(words: list[str]) -> None:
    """Whatever is understood without click, click understands in the same way."""
    found = quick.parse_restore(["restore", *words])
    if found is not None:
        with restore.make_context("restore", list(words)) as context:
            assert found == context.params


def test_the_quick_way_knows_every_option() -> None:
    """Click's options, the quick way's and the function's arguments are the same."""
    options = {
        name: parameter.name
        for parameter in restore.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    assert options == quick.FLAGS | quick.VALUES
    assert set(quick.RestoreArguments.__annotations__) == set(
        inspect.signature(restore_image).parameters
    )


@pytest.mark.parametrize(
    ("words", "image", "eager"),
    [([], None, False), (["calm"], "calm", False), (["--eager", "calm"], "calm", True)],
)
def test_plain_forms_are_quick(words: list[str], image: str | None, eager: bool) -> None:
    """The forms that people type are understood without click."""
    found = quick.parse_restore(["restore", *words])
    assert found is not None
    assert (found["image"], found["eager"]) == (image, eager)


@pytest.mark.parametrize("words", [["--help"], ["a", "b"], ["--store"], ["--frob"], ["--eager=1"]])
def test_the_rest_is_left_to_click(words: list[str]) -> None:
    """Help and mistakes are click's."""
    assert quick.parse_restore(["restore", *words]) is None


def test_completion_is_left_to_click(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shell completes, nothing is restored."""
    monkeypatch.setenv("_LZY_COMPLETE", "bash_complete")
    assert quick.parse_restore(["restore"]) is None
