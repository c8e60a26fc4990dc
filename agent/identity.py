"""Who this node is: its name, what it has, and where other nodes reach it (`LZY_HOME/node.json`).

Without that file a node is the machine: its host name, all its CPUs, memory and GPUs, and no other
node reaches it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.errors import Damaged, LzyError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


class Identity(NamedTuple):
    """A node. `address` is HOST:PORT, empty where other nodes do not reach it."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: int = 0
    declared_gpus: bool = False
    """The GPUs are not there: they were declared, to try things out."""
    labels: dict[str, str] = {}  # noqa: RUF012 - never changed in place
    address: str = ""
    price_per_hour: float = 0.0
    migrator: str = ""
    """HOST:PORT of the fleet's migrator, who is asked for names; empty where there is none."""


def check_node_name(name: str) -> str:
    """`name` if a node can be called so, else LzyError."""
    if not _NAME.fullmatch(name):
        raise LzyError(
            f"a node cannot be called {name[:80]!r}",
            remedy="use up to 32 of a-z 0-9 -, beginning and ending with a letter or digit",
        )
    return name


def identity_path(folder: Path) -> Path:
    """The file that tells who the node of a home is."""
    return folder / "node.json"


def read_identity(folder: Path) -> Identity:
    """Who the node of that home is. Raises Damaged."""
    try:
        found: dict[str, Any] = json.loads(identity_path(folder).read_bytes())
        return Identity(**found)
    except FileNotFoundError:
        return of_machine()
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{identity_path(folder)} is damaged: {error}") from error


def write_identity(folder: Path, identity: Identity) -> None:
    """Say who the node of that home is, from its agent's next start on."""
    path = identity_path(folder)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(identity._asdict(), indent=1) + "\n")
    draft.rename(path)


def of_machine() -> Identity:
    """The node that is this whole machine."""
    wished = os.environ.get("LZY_NODE") or socket.gethostname().partition(".")[0]
    name = re.sub(r"[^a-z0-9-]+", "-", wished.lower())[:32].strip("-") or "node"
    return Identity(name, float(os.cpu_count() or 1), memory_total_bytes(), count_gpus())


def memory_total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def count_gpus() -> int:
    """GPUs that the machine has, by their device files (NVIDIA's driver makes one for each)."""
    return sum(bool(re.fullmatch(r"nvidia[0-9]+", name)) for name in os.listdir("/dev"))
