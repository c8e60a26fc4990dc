"""The progress line on stderr: stage, bar, rate and remaining time, once work takes a second."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from .layout import bar, duration, size

SHOWN_AFTER_S = 1.0


class ProgressLine:
    """A context manager whose `update` is the engine's `Progress`; silent off a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._began_s = time.monotonic()
        self._stage = ""
        self._stage_began_s = self._began_s
        self._stage_began_bytes = 0
        self._drawn = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.erase()

    def update(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Draw that `done_bytes` of `total_bytes` of `stage` are done (0 total: not known)."""
        if not self._shown:
            return
        now_s = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began_s, self._stage_began_bytes = stage, now_s, done_bytes
        if now_s - self._began_s < SHOWN_AFTER_S:
            return
        elapsed_s = now_s - self._stage_began_s
        rate = (done_bytes - self._stage_began_bytes) / elapsed_s if elapsed_s > 0.2 else 0.0
        self._draw(describe_progress(stage, done_bytes, total_bytes, rate))

    def _draw(self, line: str) -> None:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        sys.stderr.write(f"\r{line[: columns - 1]}\033[K")
        sys.stderr.flush()
        self._drawn = True

    def erase(self) -> None:
        """Take the line away until the next `update`."""
        if self._drawn:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._drawn = False


def describe_progress(stage: str, done_bytes: int, total_bytes: int, rate: float) -> str:
    """One line; `rate` in bytes a second, 0 when not known yet."""
    parts = [stage.ljust(10)]
    if total_bytes:
        parts.append(f"▕{bar(done_bytes, total_bytes)}▏{100 * done_bytes / total_bytes:3.0f} %")
        parts.append(f"{size(done_bytes)} of {size(total_bytes)}")
    elif done_bytes:
        parts.append(size(done_bytes))
    if rate > 0:
        parts.append(f"{size(rate)}/s")
        if done_bytes < total_bytes:
            left_s = (total_bytes - done_bytes) / rate
            parts.append(f"{duration(round(left_s)) if left_s >= 1 else '<1 s'} left")
    return "  ".join(parts)
