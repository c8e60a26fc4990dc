"""Options and arguments that several commands share, and what tab completes them to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .stores import open_store

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


def _complete_folder(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(typed, type="dir")]


def store_option(function: F) -> F:
    """`--store DIR`; the command gets a string as `store`, None when it was not given."""
    return click.option(
        "--store",
        metavar="DIR",
        shell_complete=_complete_folder,
        help="The store's folder.  [default: $LZY_HOME/store]",
    )(function)


def json_option(function: F) -> F:
    """`--json`; the command gets it as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document for programs."
    )(function)


def complete_image(ctx: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
    """Names in the store that begin with what was typed, newest first.

    A session once, by its name; its checkpoints one by one as soon as only they are left.
    """
    from click.shell_completion import CompletionItem

    from ..checkpoint.errors import LzyError
    from ..checkpoint.history import list_sessions, split_name
    from .layout import count, size

    try:
        store = open_store(ctx.params.get("store"))
        images = store.images()
        sessions = list_sessions(store)
    except (LzyError, OSError):
        return []  # a shell waiting for a completion has no place to show an error
    given = ctx.params.get("images") or ()
    found: dict[str, str] = {}
    for image in images:
        session, number = split_name(image.name)
        several = len(sessions.get(session, [])) > 1
        if several:
            found.setdefault(session, count(len(sessions[session]), "checkpoint"))
        if several and typed.startswith(session):
            found[f"{session}@{number}"] = size(image.raw_bytes)
        elif not several:
            found[image.name] = size(image.raw_bytes)
    return [
        CompletionItem(name, help=words)
        for name, words in found.items()
        if name.startswith(typed) and name not in given
    ]


def complete_session(ctx: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
    """Names of sessions that begin with what was typed, newest first."""
    from ..checkpoint.history import split_name

    offered = complete_image(ctx, _, typed)
    return [item for item in offered if split_name(item.value) == (item.value, 1)]


def complete_pid(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    """Pids of processes that this user may dump, Python first, with their command lines."""
    import os

    from click.shell_completion import CompletionItem

    me, mine = os.geteuid(), os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or not name.startswith(typed) or int(name) == mine:
            continue
        try:
            if me and os.stat(f"/proc/{name}").st_uid != me:
                continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # gone meanwhile
        if words:  # kernel threads have none
            found.append(("python" not in words, -int(name), words))
    return [CompletionItem(str(-number), help=words[:60]) for _, number, words in sorted(found)]


def image_argument(function: F) -> F:
    """An IMAGE that may be left out for the latest; the command gets it as `image`."""
    return click.argument("image", required=False, shell_complete=complete_image)(function)
