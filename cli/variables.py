"""`lzy show --variables`: what a session is made of, by the names that a person gave."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layout import age, bar, count, facts, paint, say, say_json, share, size, table
from .stores import load_image, open_store

if TYPE_CHECKING:
    from ..checkpoint.belongings import Belongings, Variable

SHOWN_ROWS = 20
ALL_ROWS = 5000


def show_variables(name: str | None, store: str | None, everything: bool, as_json: bool) -> None:
    """Say the variables of a living process (a pid) or those that an image has recorded."""
    rows = ALL_ROWS if everything else SHOWN_ROWS
    about: dict[str, Any]
    pid = living_pid(name, store)
    if pid is not None:
        from ..checkpoint.belongings import list_belongings

        belongings = list_belongings(pid, limit=rows)
        resident_bytes = _resident_bytes(pid)
        about = {"pid": pid, "image": None, "resident_bytes": resident_bytes}
        head = [("process", f"{pid}, Python {belongings.python}")]
        head.append(("memory", f"{size(resident_bytes)} of its own in use"))
    else:
        belongings, document, image = recorded(name, store)
        about = {"pid": document.get("pid"), "image": image, "resident_bytes": None}
        head = [("image", paint(image, "bold"))]
        head.append(("process", f"{document.get('pid', '?')}, Python {belongings.python}"))
        if taken := document.get("taken_unix_s"):
            head.append(("taken", age(time.time() - taken)))
    if as_json:
        say_json({**about, **as_document(belongings, rows)})
    else:
        say([*facts([*head, *totals(belongings)]), "", *table_of(belongings, rows)])


def living_pid(name: str | None, store: str | None) -> int | None:
    """The pid that `name` is; None where it names an image, or nothing that lives."""
    from ..checkpoint.errors import LzyError

    if not name or not name.isdecimal():
        return None
    try:
        if any(image.name.partition("@")[0] == name for image in open_store(store).images()):
            return None
    except LzyError:
        pass  # no store, no such image
    return int(name)


def recorded(name: str | None, store: str | None) -> tuple[Belongings, dict[str, Any], str]:
    """(variables, document, name) of an image; NotFound if it was made without a list."""
    from ..checkpoint.belongings import read_belongings
    from ..checkpoint.errors import NotFound

    with load_image(store, name) as image:
        document = image.document
        if not document.get("variables"):
            raise NotFound(
                f"image {image.name} has no list of variables",
                remedy="`lzy dump --trim` records one; `lzy show PID --variables` asks a process",
                image=image.name,
            )
        return read_belongings(document["variables"]), document, image.name


def as_document(belongings: Belongings, rows: int) -> dict[str, Any]:
    """The list as docs/cli.md specifies it."""
    return {
        **belongings._asdict(),
        "variables": [variable._asdict() for variable in belongings.variables[:rows]],
    }


def totals(belongings: Belongings) -> list[tuple[str, str]]:
    words = f"{count(belongings.names, 'variable')}, {size(belongings.bytes)}"
    if belongings.device_bytes:
        words += f" and {size(belongings.device_bytes)} of GPU memory"
    if not belongings.complete:
        words += " at least: there was no time to look at everything"
    return [("variables", words)]


def table_of(belongings: Belongings, rows: int) -> list[str]:
    """The variables for people, largest first."""
    shown = belongings.variables[:rows]
    largest = max((variable.bytes for variable in shown), default=0)
    lines = table(
        ["size", "", "", "name", "type", ""],
        [
            (
                ("~" if variable.estimated else "") + size(variable.bytes),
                share(variable.bytes, belongings.bytes) if belongings.bytes else "",
                paint(bar(variable.bytes, largest), "cyan"),
                paint(variable.name[:40], "bold"),
                variable.type[:40],
                _remark(variable),
            )
            for variable in shown
        ],
        right=(0, 1),
    )
    hidden = belongings.names - len(shown)
    return lines + ([paint(f"… and {hidden} smaller; --all shows them", "dim")] if hidden else [])


def _remark(variable: Variable) -> str:
    words = [variable.what] if variable.what else []
    if variable.device_bytes:
        words.append(f"{size(variable.device_bytes)} on a GPU")
    if variable.same_as:
        words.append(f"the same as {variable.same_as[:40]}")
    return ", ".join(words)


def _resident_bytes(pid: int) -> int:
    """Resident anonymous memory of a process; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("RssAnon:")
    )
