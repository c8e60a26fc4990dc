"""Several things that a machine lacks, told in one error."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import Incompatible


def refuse_lacking(problems: Sequence[Incompatible]) -> None:
    """Raise what is wrong: a single problem as it is, several in one error that lists them.

    Its fact `missing` is a list of `path` (or null), `message` and `remedy`.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    words = "".join(f"\n  {problem.message}" for problem in problems)
    raise Incompatible(
        f"{len(problems)} things that the image needs are not here as they were:{words}",
        remedy="; or: ".join(dict.fromkeys(problem.remedy for problem in problems)),
        missing=[
            {"path": it.facts.get("path"), "message": it.message, "remedy": it.remedy}
            for it in problems
        ],
    )
