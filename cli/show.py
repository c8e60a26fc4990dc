"""`lzy show`: what is in an image, and what took the space.

Where the bytes are is computed from the run table, not recorded: each stored page belongs to one
mapping (or to one memory object), and a chunk's stored bytes are shared out over its pages, so
that the parts add up to the whole.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from .arguments import image_argument, json_option, store_option
from .family import draw_tree, list_processes
from .layout import age, bar, count, facts, paint, say, say_json, share, size, table
from .stores import load_image

if TYPE_CHECKING:
    from ..checkpoint.image import Image

_PAGE_BYTES = 4096
_SHOWN_ROWS = 12


@dataclass
class _Held:
    """Something whose pages the image holds."""

    raw_bytes: int = field(default=0, init=False)
    stored_bytes: float = field(default=0.0, init=False)

    def hold(self, pages: int, stored_bytes: float) -> None:
        self.raw_bytes += pages * _PAGE_BYTES
        self.stored_bytes += stored_bytes


@dataclass
class Object(_Held):
    """A memory object (memfd, shared memory, deleted file) by its space's number; a carried file.

    Only the latter has a path, and memory in /dev/shm.
    """

    space: int
    path: str = ""
    carried: bool = False


@dataclass
class Mapping(_Held):
    """A VMA of the image."""

    start: int
    end: int
    permissions: str
    kind: str
    path: str

    @property
    def length_bytes(self) -> int:
        return self.end - self.start


@click.command(
    epilog="""\b
    Examples:
      lzy show                              the latest image
      lzy show before-training --all        every mapping and descriptor
      lzy show 4121 --variables             what the session in process 4121 is made of
      lzy show --json | jq '.mappings | max_by(.raw_bytes)'
    """
)
@image_argument
@store_option
@click.option("--all", "everything", is_flag=True, help="Show every row, not only the largest.")
@click.option(
    "--variables",
    is_flag=True,
    help="The largest variables instead, of an image or of a living PID.",
)
@json_option
def show(
    image: str | None, store: str | None, everything: bool, variables: bool, as_json: bool
) -> None:
    """Tell what is in IMAGE (the latest without it) and what takes the space.

    Processes, threads, mappings by size, descriptors; for each mapping how much of it is in the
    image. Pages of zeros and unchanged pages of files are not. Of several processes the tables are
    about the first; NAME#PID names another.
    """
    if variables:
        from .variables import show_variables

        show_variables(image, store, everything, as_json)
        return
    loaded = load_image(store, image)
    try:
        mappings, objects = weigh(loaded)
        if as_json:
            say_json(as_document(loaded, mappings, objects))
        else:
            say(describe(loaded, mappings, objects, None if everything else _SHOWN_ROWS))
    finally:
        loaded.close()


def weigh(image: Image) -> tuple[list[Mapping], list[Object]]:
    """The image's mappings and memory objects, with the bytes of each that the image holds."""
    mappings = sorted(
        (_read_mapping(vma) for vma in image.document.get("vmas", [])), key=lambda m: m.start
    )
    objects: dict[int, Object] = {}
    stored_per_page = _stored_per_page(image)
    window_bytes = image.window_pages * _PAGE_BYTES
    first, last = image.space_extent(0)
    members = {member["space"] for member in image.document.get("members", ())}
    carried = {
        entry["space"]: entry["path"]
        for entry in image.document.get("carried", ())
        if "space" in entry
    }
    described = image.document.get("objects", ())
    named = {each["space"]: each["path"] for each in described if "path" in each}
    here = 0  # the first mapping that ends behind the window at hand; both are sorted
    for index in range(image.run_count):
        address, mask, chunk = image.run(index)
        if not first <= index < last:
            space = image.runs[3 * index + 2] >> 32
            if space in members:
                continue
            path = carried.get(space, named.get(space, ""))
            held = objects.setdefault(space, Object(space, path, space in carried))
            held.hold(mask.bit_count(), _stored(image, chunk, mask, mask, stored_per_page))
            continue
        while here < len(mappings) and mappings[here].end <= address:
            here += 1
        at = here
        while at < len(mappings) and mappings[at].start < address + window_bytes:
            low = max(mappings[at].start - address, 0) // _PAGE_BYTES
            high = min(mappings[at].end - address, window_bytes) // _PAGE_BYTES
            within = mask >> low & ((1 << (high - low)) - 1)
            stored_bytes = _stored(image, chunk, mask, within << low, stored_per_page)
            mappings[at].hold(within.bit_count(), stored_bytes)
            at += 1
    return mappings, list(objects.values())


def _stored_per_page(image: Image) -> list[float]:
    """For each chunk its stored bytes, shared out over all pages of the image that are in it."""
    pages = [0] * image.chunk_count
    for index in range(image.run_count):
        _, mask, chunk = image.run(index)
        for _, taken, number in image.pieces(chunk, mask):
            pages[number] += taken.bit_count()
    return [
        image.chunk_place(chunk)[2].stored_bytes / max(number, 1)
        for chunk, number in enumerate(pages)
    ]


def _stored(image: Image, chunk: int, mask: int, pages: int, stored_per_page: list[float]) -> float:
    """Stored bytes of `pages` among the pages `mask` that a run record finds in `chunk`."""
    return sum(
        (piece.taken & pages).bit_count() * stored_per_page[piece.chunk]
        for piece in image.pieces(chunk, mask)
    )


def _read_mapping(vma: dict[str, Any]) -> Mapping:
    return Mapping(
        start=vma["start"],
        end=vma["end"],
        permissions=str(vma.get("permissions", "")),
        kind=str(vma.get("kind", "")),
        path=str(vma.get("path") or ""),
    )


def _name(held: Mapping | Object) -> str:
    """What a person calls it: its file, else its kind."""
    if isinstance(held, Object):
        if held.carried:
            return f"{held.path} (carried)"
        return held.path or f"memory object {held.space}"
    return held.path or held.kind or "anonymous"


def as_document(image: Image, mappings: list[Mapping], objects: list[Object]) -> dict[str, object]:
    """The image as docs/cli.md specifies it."""
    document = image.document
    return {
        "image": image.name,
        "taken_unix_s": document.get("taken_unix_s"),
        "comm": document.get("comm"),
        "pid": document.get("pid"),
        "raw_bytes": image.raw_bytes,
        "stored_bytes": image.stored_bytes,
        "chunks": image.chunk_count,
        "window_bytes": image.window_pages * _PAGE_BYTES,
        "processes": list_processes(image),
        "threads": [
            {"tid": thread.get("tid"), "comm": thread.get("comm")}
            for thread in document.get("threads", [])
        ],
        "mappings": [
            {
                "start": mapping.start,
                "end": mapping.end,
                "length_bytes": mapping.length_bytes,
                "permissions": mapping.permissions,
                "kind": mapping.kind,
                "path": mapping.path or None,
                "raw_bytes": mapping.raw_bytes,
                "stored_bytes": round(mapping.stored_bytes),
            }
            for mapping in mappings
        ],
        "objects": [
            {
                "object": held.space,
                "path": held.path or None,
                "raw_bytes": held.raw_bytes,
                "stored_bytes": round(held.stored_bytes),
            }
            for held in objects
        ],
        "descriptors": [
            {"descriptor": number, "kind": kind, "words": words}
            for number, kind, words in _descriptors(document)
        ],
        "system_v": [
            {"kind": kind, "number": number, "words": words}
            for kind, number, words in _system_v(document)
        ],
    }


def describe(
    image: Image, mappings: list[Mapping], objects: list[Object], rows: int | None
) -> list[str]:
    """The image for people; at most `rows` rows of each table."""
    document = image.document
    threads = document.get("threads", [])
    taken = document.get("taken_unix_s")
    stored_bytes = sum(
        image.chunk_place(chunk)[2].stored_bytes for chunk in range(image.chunk_count)
    )
    memory = f"{size(image.raw_bytes)} → {size(stored_bytes)} "
    memory += f"({share(stored_bytes, image.raw_bytes)})"
    if shared_bytes := stored_bytes - image.stored_bytes:
        memory += f", of which {size(shared_bytes)} shared with older images"
    lines = facts(
        [
            ("image", paint(image.name, "bold")),
            ("process", f"{document.get('comm', '?')}, pid {document.get('pid', '?')}"),
            ("taken", age(time.time() - taken) if taken else "unknown"),
            ("memory", memory),
            (
                "chunks",
                f"{image.chunk_count:,} of up to {size(image.window_pages * _PAGE_BYTES)}",
            ),
        ]
    )
    processes = list_processes(image)
    if len(processes) > 1:
        title = f"{len(processes)} processes (lzy show {image.name}#PID tells more of one)"
        lines += _section(title, draw_tree(processes))
    lines += _section(f"{count(len(threads), 'thread')}", _thread_rows(threads))
    lines += _section("what takes the space", _space_rows(mappings, objects, rows))
    lines += _section(f"{count(len(mappings), 'mapping')}", _mapping_rows(mappings, rows))
    descriptors = _descriptors(document)
    lines += _section(f"{count(len(descriptors), 'descriptor')}", _descriptor_rows(descriptors))
    if found := _system_v(document):
        rows_of_it = [(kind, str(number), words) for kind, number, words in found]
        lines += _section("System V", table(["kind", "number", "holds"], rows_of_it, right=(1,)))
    return lines


def _system_v(document: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(kind, number, what it holds) of semaphores and message queues."""
    found = document.get("system_v", {})
    rows = []
    for one in found.get("sem", ()):
        values = " ".join(map(str, one["values"][:8])) + " …" * (len(one["values"]) > 8)
        rows.append(("semaphores", one["number"], values))
    for one in found.get("msg", ()):
        messages = one["messages"]
        words = "not read" if messages is None else count(len(messages), "message")
        rows.append(("message queue", one["number"], words))
    return rows


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", paint(title, "bold"), *lines] if lines else []


def _thread_rows(threads: list[dict[str, Any]]) -> list[str]:
    """Threads by name: an interpreter has many of the same."""
    tids: dict[str, list[int]] = {}
    for thread in threads:
        tids.setdefault(str(thread.get("comm", "?")), []).append(thread.get("tid", 0))
    rows = []
    for comm, numbers in tids.items():
        listed = " ".join(str(tid) for tid in numbers[:8])
        rows.append((comm, str(len(numbers)), listed + (" …" if len(numbers) > 8 else "")))
    return table(["name", "count", "tids"], rows, right=(1,))


def _space_rows(mappings: list[Mapping], objects: list[Object], rows: int | None) -> list[str]:
    """Bytes in the image by what a person calls the mapping, largest first."""
    raw: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    everything: list[Mapping | Object] = [*mappings, *objects]
    for held in everything:
        if held.raw_bytes:
            raw[_name(held)] += held.raw_bytes
            stored[_name(held)] += round(held.stored_bytes)
    largest = stored.most_common(1)[0][1] if stored else 0
    lines = table(
        ["memory", "stored", "", "", "of"],
        [
            (
                size(raw[name]),
                size(length),
                share(length, stored.total()),
                paint(bar(length, largest), "cyan"),
                name,
            )
            for name, length in stored.most_common(rows)
        ],
        right=(0, 1, 2),
    )
    return lines + _rest(len(stored), rows) if stored else []


def _mapping_rows(mappings: list[Mapping], rows: int | None) -> list[str]:
    """Mappings, those of which most is in the image first."""
    by_size = sorted(mappings, key=lambda m: (-m.raw_bytes, -m.length_bytes))
    lines = table(
        ["address", "", "mapped", "in the image", "of"],
        [
            (
                f"{mapping.start:#x}",
                mapping.permissions,
                size(mapping.length_bytes),
                size(mapping.raw_bytes) if mapping.raw_bytes else "–",
                _name(mapping),
            )
            for mapping in by_size[:rows]
        ],
        right=(0, 2, 3),
    )
    return lines + _rest(len(mappings), rows)


def _descriptors(document: dict[str, Any]) -> list[tuple[int, str, str]]:
    """(number, kind, what it is) of each descriptor of the image's table."""
    held = document.get("descriptors", {})
    descriptions = held.get("descriptions", [])
    found = []
    for number, entry in held.get("descriptors", {}).items():
        index = entry.get("description")
        described = descriptions[index] if index is not None else {}
        words = next((described[k] for k in _TELLING if described.get(k)), "")
        found.append((int(number), str(described.get("kind", "?")), str(words)))
    return sorted(found)


# What tells a descriptor from others of its kind, best first.
_TELLING = ("path", "name", "target", "address", "local", "peer", "count")


def _descriptor_rows(descriptors: list[tuple[int, str, str]]) -> list[str]:
    """Descriptors by kind: an event loop has many of the same."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for number, kind, words in descriptors:
        kinds.setdefault(kind, []).append((number, words))
    rows = []
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        numbers = " ".join(str(number) for number, _ in members[:10])
        if len(members) > 10:
            numbers += " …"
        words = ", ".join(dict.fromkeys(words for _, words in members if words))
        rows.append(
            (kind, str(len(members)), numbers, words if len(words) < 60 else words[:59] + "…")
        )
    return table(["kind", "count", "numbers", ""], rows, right=(1,))


def _rest(whole: int, rows: int | None) -> list[str]:
    if rows is None or whole <= rows:
        return []
    return [paint(f"… and {whole - rows} more; --all shows them", "dim")]
