"""The processes of an image as a tree: who is whose child, and what each holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layout import count, size

if TYPE_CHECKING:
    from ..checkpoint.image import Image

_PAGE_BYTES = 4096


def list_processes(image: Image) -> list[dict[str, Any]]:
    """Every process of the image, parents before their children, as docs/cli.md specifies it.

    `raw_bytes` is memory that the image holds for this process, `shared_bytes` what it shares
    copy-on-write with its parent.
    """
    document = image.document
    listed = []
    for described in (document, *document.get("members", ())):
        first, last = image.space_extent(described.get("space", 0))
        pages = sum(image.run(index)[1].bit_count() for index in range(first, last))
        listed.append(
            {
                "pid": described.get("pid"),
                "parent_pid": described.get("process", {}).get("parent"),
                "comm": described.get("comm"),
                "state": "stopped" if described.get("process", {}).get("stopped") else "alive",
                "threads": len(described.get("threads", ())),
                "descriptors": len(described.get("descriptors", {}).get("descriptors", ())),
                "raw_bytes": pages * _PAGE_BYTES,
                "shared_bytes": sum(end - start for start, end in described.get("inherited", ())),
            }
        )
    for ended in document.get("zombies", ()):
        listed.append(
            {
                "pid": ended["pid"],
                "parent_pid": ended["parent"],
                "comm": ended["comm"],
                "state": "ended",
                "threads": 0,
                "descriptors": 0,
                "raw_bytes": 0,
                "shared_bytes": 0,
            }
        )
    return listed


def draw_tree(processes: list[dict[str, Any]]) -> list[str]:
    """A line for each process, indented below its parent."""
    below: dict[int, list[dict[str, Any]]] = {}
    for process in processes[1:]:
        below.setdefault(process["parent_pid"], []).append(process)
    lines: list[str] = []

    def draw(process: dict[str, Any], lead: str, branch: str, next_lead: str) -> None:
        lines.append(f"  {lead}{branch}{_describe(process)}")
        children = below.get(process["pid"], [])
        for child in children:
            last = child is children[-1]
            draw(child, lead + next_lead, "└─ " if last else "├─ ", "   " if last else "│  ")

    draw(processes[0], "", "", "")
    return lines


def _describe(process: dict[str, Any]) -> str:
    name = f"{process['pid']} {process['comm']}"
    if process["state"] == "ended":
        return f"{name}, ended, not yet waited for"
    words = [name, count(process["threads"], "thread"), count(process["descriptors"], "descriptor")]
    words.append(size(process["raw_bytes"]))
    if process["shared_bytes"]:
        words[-1] += f" and {size(process['shared_bytes'])} shared with its parent"
    if process["state"] == "stopped":
        words.append("stopped")
    return ", ".join(words)
