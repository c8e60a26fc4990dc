"""Verifying an image: every chunk is read, decoded and compared with its id."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .buffers import page_aligned
from .codec import MOST_CHUNK_BYTES
from .errors import Damaged
from .linux import PAGE_BYTES
from .packs import Stored

if TYPE_CHECKING:
    from .image import Image
    from .pending import Progress


class VerifyReport(NamedTuple):
    """What was found sound: sizes in bytes, time in seconds."""

    name: str
    chunks: int
    packs: int
    content_bytes: int
    stored_bytes: int
    duration_s: float


Place = tuple[bytes, bytes, Stored]
"""Of a chunk: its id, its pack's, and where it lies in that."""


def list_places(image: Image) -> frozenset[Place]:
    """Where its chunks lie: what two images of a store have in common is the same bytes in both."""
    return frozenset(map(partial(_place, image), range(image.chunk_count)))


def _place(image: Image, number: int) -> Place:
    content_id, pack, place = image.chunk_place(number)
    return content_id, image.packs[pack][0] if pack < len(image.packs) else b"", place


def verify_image(
    image: Image,
    progress: Progress | None = None,
    workers: int = 2,
    *,
    known: frozenset[Place] = frozenset(),
) -> VerifyReport:
    """Read and authenticate all of `image`; Damaged or StoreUnavailable at the first fault.

    Chunks of another image that lie at the same places are `known` to be right (`list_places`).
    """
    started = time.monotonic()
    places = [image.chunk_place(number) for number in range(image.chunk_count)]
    _check_runs(image, [place.raw_bytes for _, _, place in places])
    order = sorted(range(len(places)), key=lambda n: (places[n][1], places[n][2].offset))
    if known:
        order = [number for number in order if _place(image, number) not in known]
    total = sum(places[number][2].raw_bytes for number in order)
    done = [0] * workers
    failures: list[BaseException] = []

    def read(worker: int) -> None:
        buffer = page_aligned(MOST_CHUNK_BYTES)[2]
        try:
            # Alternating runs of chunks: both readers stay near each other in the same packs.
            for start in range(worker * 16, len(order), workers * 16):
                for number in order[start : start + 16]:
                    if failures:
                        return
                    done[worker] += image.read_chunk(number, buffer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            if progress is not None and thread.is_alive():
                progress("verify", sum(done), total)
    if failures:
        raise failures.pop()  # and not kept: frame and error would keep each other alive
    if progress is not None:
        progress("verify", total, total)
    image.document  # noqa: B018 - reading it is the check
    return VerifyReport(
        name=image.name,
        chunks=image.chunk_count,
        packs=len(image.packs),
        content_bytes=total,
        stored_bytes=sum(place.stored_bytes for _, _, place in places),
        duration_s=time.monotonic() - started,
    )


def _check_runs(image: Image, lengths: list[int]) -> None:
    last = (-1, -1)
    window_bytes = image.window_pages * PAGE_BYTES
    for index in range(image.run_count):
        address, mask, chunk = image.run(index)
        place = (image.run_space(index), address)
        if (
            place <= last
            or address % window_bytes
            or mask >> image.window_pages
            or chunk >= len(lengths) + image.patchwork_count
            or any(
                held.bit_count() * PAGE_BYTES != lengths[number] or held >> image.window_pages
                for held, _, number in image.pieces(chunk, mask)
            )
        ):
            raise Damaged(f"record {index} of image {image.name} ({address:#x}) is impossible")
        last = place
