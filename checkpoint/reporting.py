"""Reports how far a writer has got, ten times a second, while a block runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .fitness import Progress

if TYPE_CHECKING:
    from .writer import ImageWriter

_PERIOD_S = 0.1


class reporting:
    """Report a writer's progress while the block runs."""

    def __init__(
        self, progress: Progress | None, stage: str, writer: ImageWriter, total_bytes: int
    ) -> None:
        self._progress, self._stage, self._writer = progress, stage, writer
        self._total_bytes = total_bytes

    def __enter__(self) -> None:
        if self._progress:
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._report, daemon=True)
            self._thread.start()

    def _report(self) -> None:
        assert self._progress
        while not self._ended.wait(_PERIOD_S):
            self._progress(self._stage, self._writer.raw_bytes_done, self._total_bytes)

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._ended.set()
            self._thread.join()
