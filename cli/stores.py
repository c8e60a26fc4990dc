"""Which store a command means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.home import default_store

if TYPE_CHECKING:
    from ..checkpoint.image import Image
    from ..checkpoint.store import Store


def store_path(given: str | None) -> Path:
    """The folder that `--store` names, or the default one."""
    return Path(given).expanduser() if given else default_store()


def open_store(given: str | None, *, create: bool = False) -> Store:
    """The store that `--store` names, or the default one; NotFound without `create`."""
    from ..checkpoint.store import Store

    return Store.open(store_path(given), create=create)


def load_image(given: str | None, asked: str | None) -> Image:
    """The image that `asked` means in that store: NAME, NAME@NUMBER, or None for the latest.

    With #PID behind it: what is in it of that process of several.
    """
    from ..checkpoint.errors import NotFound
    from ..checkpoint.history import resolve

    store = open_store(given)
    name, mark, member = (asked or "").partition("#")
    if mark and not member.isdecimal():
        raise NotFound(f"{asked} names no process", remedy=f"see: lzy show {name}")
    found = resolve(store, name or None)
    return store.load(f"{found}{mark}{member}" if found else None)
