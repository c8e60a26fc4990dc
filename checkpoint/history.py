"""A session's history: its checkpoints are images that share a name and count up from 1.

Checkpoint 1 of session `calm` is the image `calm`, checkpoint k ≥ 2 the image `calm@k`. What a
person types is *resolved*: `calm` is the newest checkpoint, `calm@1` the first, `calm@k` the k-th.
The names of the images are all there is to a series: nothing else has to be kept true beside
them, a checkpoint that is removed leaves a gap, and an image from before there were sessions is a
session of one. Each image's document says which checkpoint it grew from, so that a series may
branch (`log.py`).
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import Busy, LzyError, NotFound
from .image import MOST_NAME_BYTES
from .lineage import find_lineage, list_lineages, write_lineage
from .store import check_name
from .unavailable import unavailable

if TYPE_CHECKING:
    from .image import Image
    from .store import Store

ASKED = "asked"
"""Why a checkpoint was taken: somebody asked for it."""
TO_DOZE = "doze"
"""The process is to give its memory back: what an account leaves out cannot go."""

_NUMBERED = re.compile(r"(.+)@([1-9][0-9]{0,8})")
_SUFFIX = ".image"
_MOST_SESSION_NAME_BYTES = MOST_NAME_BYTES - 10


# -- names -------------------------------------------------------------------------------------


def image_name(session: str, number: int) -> str:
    """The image that holds checkpoint `number` of `session`."""
    return session if number == 1 else f"{session}@{number}"


def split_name(name: str) -> tuple[str, int]:
    """(session, number) of an image's name, or of `SESSION@NUMBER` as a person writes it."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 1)


def has_number(name: str) -> bool:
    """Whether `name` ends in a checkpoint's number, so that no session may be called so."""
    return bool(_NUMBERED.fullmatch(name))


def spell(image: str) -> str:
    """An image's name as it is understood whatever else is in the store: `calm@1` for `calm`."""
    session, number = split_name(image)
    return f"{session}@{number}"


def list_sessions(store: Store) -> dict[str, list[int]]:
    """The numbers of each session's checkpoints, ascending."""
    found: dict[str, list[int]] = {}
    for name in store.names():
        session, number = split_name(name)
        found.setdefault(session, []).append(number)
    for numbers in found.values():
        numbers.sort()
    return found


def list_numbers(store: Store, session: str) -> list[int]:
    """The numbers of the checkpoints of `session`, ascending; empty when there is none.

    This is on the way of every restore: one listing of a directory and no file is opened.
    """
    first, begins = session + _SUFFIX, session + "@"
    found = []
    try:
        files = os.listdir(store.manifests)
    except OSError as error:
        raise unavailable(f"list the images of {store.path}", error) from error
    for file in files:
        if file == first:
            found.append(1)
        elif file.startswith(begins) and file.endswith(_SUFFIX):
            owner, number = split_name(file[: -len(_SUFFIX)])
            if owner == session and number > 1:
                found.append(number)
    found.sort()
    return found


def resolve(store: Store, asked: str | None) -> str | None:
    """The image that a person means by `asked`; None, the latest, stays None.

    A session's name alone means its newest checkpoint. Raises NotFound, which says what there is.
    """
    return None if asked is None else require_image(store, asked)


def require_image(store: Store, asked: str) -> str:
    """`resolve` for a name that was given."""
    session, number = split_name(asked)
    if number == 1:
        numbers = list_numbers(store, session)
        if not has_number(asked) and numbers:
            return image_name(session, numbers[-1])
        if 1 in numbers:
            return session
    check_name(asked)
    if not _exists(store, asked):
        raise _unknown(store, asked)
    return asked


def _exists(store: Store, image: str) -> bool:
    try:
        os.stat(image + _SUFFIX, dir_fd=store.manifests, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def require_session(store: Store, session: str) -> list[int]:
    """The numbers of a session's checkpoints, ascending. Raises NotFound when it has none."""
    numbers = list_numbers(store, session)
    if not numbers:
        raise _unknown(store, session)
    return numbers


def _unknown(store: Store, asked: str) -> NotFound:
    session, number = split_name(asked)
    numbers = list_numbers(store, session)
    if numbers and has_number(asked):
        return NotFound(
            f"session {session} in {store.path} has no checkpoint {number}",
            remedy=f"it has {_listed(numbers)}; see lzy log {session}",
            image=asked,
        )
    return NotFound(
        f"there is no image {asked} in {store.path}", remedy="see lzy images", image=asked
    )


def _listed(numbers: list[int]) -> str:
    """`1, 3-5, 9`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


# -- which checkpoint comes next ---------------------------------------------------------------


def next_checkpoint(
    store: Store,
    pid: int,
    name: str | None,
    *,
    why: str = ASKED,
    unnamed: Callable[[], str] = lambda: "session",
) -> tuple[str, dict[str, Any]]:
    """What a dump of `pid` into `store` under `name` is to be: (image, what its document says).

    The document's `session` has the keys name, number, parent (an image's name or None) and why.
    Without a name the session goes on that the process belongs to, else one begins that
    `unnamed` calls. Raises Busy when another process's session has that name, LzyError when no
    session may be called so.
    """
    if name is not None:
        check_session_name(name)
    own = find_lineage(pid, store)
    session = name or (own.session if own else unnamed())
    numbers = list_numbers(store, session)
    parent = own.image if own else None
    if own is None or own.session != session:
        check_free(store, session, pid)
        number = 1
    else:
        number = max([own.number, *numbers]) + 1
        # Another life of the same process may be writing the next one just now.
        while number > 1 and _is_being_written(store, image_name(session, number)):
            number += 1
    facts = {"name": session, "number": number, "parent": parent, "why": why}
    return image_name(session, number), facts


def remember(store: Store, pid: int, session: dict[str, Any], notes: list[str]) -> None:
    """Keep that `pid` goes on from the checkpoint that `session` (a document's) describes.

    What cannot be kept becomes a note: the image is whole, only its successor will not know it.
    """
    image = image_name(session["name"], session["number"])
    try:
        write_lineage(pid, store.path, session["name"], session["number"], image)
    except (OSError, NotFound) as error:
        notes.append(f"the next dump will begin a new session: this one is not kept ({error})")


def remember_restored(image: Image, pid: int, session: str | None, notes: list[str]) -> None:
    """Keep that `pid` goes on from `image`: in its session, or as the first of `session`."""
    name, number = split_name(image.name)
    try:
        if session is None:
            write_lineage(pid, image.store_path, name, number, image.name)
        else:
            write_lineage(pid, image.store_path, session, 0, image.name)
    except (OSError, NotFound) as error:
        notes.append(f"the next dump will begin a new session: this one is not kept ({error})")


def check_session_name(name: str) -> str:
    """Answer `name` if a session may be called so, else raise LzyError."""
    if re.search(r"@[0-9]+$", name):
        raise LzyError(
            f"a session cannot be called {name[:200]}: what follows the @ numbers its checkpoints",
            remedy="lzy chooses the number itself; leave it out",
        )
    if len(name) > _MOST_SESSION_NAME_BYTES:
        raise LzyError(
            f"a session cannot be called {name[:200]!r}",
            remedy=f"use up to {_MOST_SESSION_NAME_BYTES} characters: its checkpoints' numbers "
            "need the rest",
        )
    return check_name(name)


def check_free(store: Store, session: str, pid: int = 0) -> None:
    """Raise Busy if a session of that name exists, or a living process but `pid` belongs to it."""
    if numbers := list_numbers(store, session):
        what = "an image" if numbers == [1] else "a session"
        raise Busy(
            f"there is {what} {session} already", remedy="choose another --name", image=session
        )
    for lineage in list_lineages(store):
        if lineage.session == session and lineage.pid != pid:
            raise Busy(
                f"session {session} is that of process {lineage.pid}",
                remedy="choose another --name",
                pid=lineage.pid,
            )


def _is_being_written(store: Store, image: str) -> bool:
    """Whether a living writer holds the reservation of that image (see `Store.writer`)."""
    try:
        descriptor = os.open(image + _SUFFIX, os.O_RDONLY | os.O_CLOEXEC, dir_fd=store.temporary)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def free_session_name(store: Store, session: str) -> str:
    """`SESSION-fork`, or with the first number behind it that no session and process has."""
    taken = set(list_sessions(store)) | {lineage.session for lineage in list_lineages(store)}
    base = re.sub(r"-fork[0-9]*$", "", session) + "-fork"
    number = 1
    while (name := base if number == 1 else f"{base}{number}") in taken:
        number += 1
    return name


def session_facts(document: dict[str, Any], image: str) -> dict[str, Any]:
    """What a document says of its session; of an older one what its name says."""
    found = document.get("session")
    if isinstance(found, dict):
        return found
    session, number = split_name(image)
    return {"name": session, "number": number, "parent": None, "why": ""}
