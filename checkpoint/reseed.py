"""Other random numbers for a second life: its interpreter draws new seeds, asked through the door.

Seeded anew, each from the operating system: `random` and every generator made of its class, numpy's
bit generators and legacy states, torch's default generators, OpenSSL under `ssl` (fresh bytes are
added to what it holds). A `torch.Generator` of one's own is not found: the collector does not know
it. What a program derived from random numbers before (keys, names, an order) stays what it is.
"""

from __future__ import annotations

from typing import NamedTuple

from . import door
from .door import Patience
from .errors import LzyError

_PATIENCE = Patience(idle_s=10.0)


class Reseeded(NamedTuple):
    """What was seeded anew: (of which library, how many generators); and what could not be."""

    generators: list[tuple[str, int]]
    failures: list[str]


def reseed(pid: int, *, patience: Patience = _PATIENCE) -> Reseeded:
    """Have the interpreter in process `pid` seed its random generators anew.

    Waits for its main thread to idle. Errors as `door.ask`: Busy, Unsupported (no Python to ask).
    """
    told = door.ask(pid, {"reseed": 1}, patience=patience)
    try:
        found = told["reseeded"]
        generators = [(_plain(name), int(count)) for name, count in found["generators"]]
        return Reseeded(generators, [_plain(words) for words in found["failures"]])
    except (KeyError, TypeError, ValueError) as error:
        raise LzyError(f"pid {pid} did not say what it seeded anew: {error}", pid=pid) from error


def in_words(reseeded: Reseeded) -> list[str]:
    """What to tell a person."""
    done = ", ".join(
        name if count == 1 else f"{name} ({count} generators)"
        for name, count in reseeded.generators
    )
    said = [f"seeded anew: {done or 'nothing, for it has no random generator'}"]
    return said + [f"not seeded anew: {words}" for words in reseeded.failures]


def _plain(words: object) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(words))[:200]
