"""What takes the space in an image, computed from its run table."""

from __future__ import annotations

from typing import Any, NamedTuple

from lzy.checkpoint.patchwork import Piece
from lzy.cli.show import as_document, describe, weigh

PAGE = 4096
WINDOW = 4 * PAGE


class Stored(NamedTuple):
    stored_bytes: int


class Image:
    """An image with windows of 4 pages and the given (space, address, mask, chunk) runs."""

    name = "calm"
    window_pages = 4

    def __init__(
        self, runs: list[tuple[int, int, int, int]], chunks: list[int], document: dict[str, Any]
    ) -> None:
        self._runs = runs
        self.runs = [v for space, a, m, c in runs for v in (a, m, c | space << 32)]
        self.run_count = len(runs)
        self.chunk_count = len(chunks)
        self._chunks = chunks
        self.document = document
        self.raw_bytes = sum(m.bit_count() for _, _, m, _ in runs) * PAGE
        self.stored_bytes = sum(chunks)

    def run(self, index: int) -> tuple[int, int, int]:
        return self._runs[index][1:]

    def pieces(self, chunk: int, mask: int) -> list[Piece]:
        return [Piece(mask, mask, chunk)]

    def space_extent(self, space: int) -> tuple[int, int]:
        inside = [i for i, run in enumerate(self._runs) if run[0] == space]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def chunk_place(self, chunk: int) -> tuple[bytes, int, Stored]:
        return b"", 0, Stored(self._chunks[chunk])


def _vma(start: int, pages: int, **facts: object) -> dict[str, object]:
    return {"start": start, "end": start + pages * PAGE, "permissions": "rw-p", **facts}


def test_pages_belong_to_the_mappings_they_are_in() -> None:
    """A window that two mappings share is split at their border; the parts add up to the whole."""
    base = 0x10000
    document = {
        "vmas": [
            _vma(base + 6 * PAGE, 6, kind="private", path=None),
            _vma(base, 2, kind="private", path="/lib/a.so"),
            _vma(base + 2 * PAGE, 4, kind="private", path="[heap]"),
        ]
    }
    image = Image(
        [
            (0, base, 0b1111, 0),  # two pages of a.so, two of the heap
            (0, base + WINDOW, 0b0110, 1),  # one of the heap, one of the last
            (0, base + 2 * WINDOW, 0b1111, 1),  # the last's; the chunk is used twice
            (1, 0, 0b0001, 2),
        ],
        [4000, 600, 50],
        document,
    )
    mappings, objects = weigh(image)  # type: ignore[arg-type]  # as much of one as is looked at
    assert [m.path for m in mappings] == ["/lib/a.so", "[heap]", ""]
    assert [m.raw_bytes // PAGE for m in mappings] == [2, 3, 5]
    assert [m.stored_bytes for m in mappings] == [2000, 2100, 500]
    assert [(o.space, o.raw_bytes, o.stored_bytes) for o in objects] == [(1, PAGE, 50)]
    assert sum(held.stored_bytes for held in (*mappings, *objects)) == image.stored_bytes


def test_an_image_of_another_version_is_shown_as_far_as_it_goes() -> None:
    """Missing keys of the document do not keep a person from seeing the rest."""
    image = Image([], [], {})
    mappings, objects = weigh(image)  # type: ignore[arg-type]  # as much of one as is looked at
    assert "calm" in describe(image, mappings, objects, 5)[0]  # type: ignore[arg-type]  # as much of one as is looked at
    document = as_document(image, mappings, objects)  # type: ignore[arg-type]  # as much of one as is looked at
    assert document["mappings"] == document["descriptors"] == []


def test_threads_and_descriptors_are_grouped() -> None:
    """Thirteen threads of the same name are one row, as are descriptors of one kind."""
    document = {
        "comm": "python3",
        "pid": 7,
        "threads": [{"tid": 7 + i, "comm": "blas" if i else "main"} for i in range(13)],
        "descriptors": {
            "descriptions": [{"kind": "pipe"}, {"kind": "file", "path": "/tmp/notes"}],
            "descriptors": {
                "0": {"description": 0},
                "1": {"description": 0},
                "5": {"description": 1},
            },
        },
    }
    image = Image([], [], document)
    text = "\n".join(describe(image, [], [], 5))  # type: ignore[arg-type]  # as much of one as is looked at
    assert "13 threads" in text
    assert "3 descriptors" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("blas", "pipe"))] == [
        ["blas", "12", "8", "9", "10", "11", "12", "13", "14", "15", "…"],
        ["pipe", "2", "0", "1"],
    ]
    assert "/tmp/notes" in text
