"""Ctrl-C when it does no harm: put off while a process is half way between two states.

So is the search for garbage cycles: a process that stands still does not wait for it.
"""

from __future__ import annotations

import gc
import signal
import threading
from types import FrameType
from typing import Any


class Deferred:
    """While the block runs, SIGINT is only remembered; at its end it takes effect. No gc meanwhile.

    In other threads than the main one Python delivers no signals, and nothing is done.
    """

    def __enter__(self) -> Deferred:
        self._came = False
        self._collects = gc.isenabled()
        gc.disable()
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._collects:
            gc.enable()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._came and kind is None:
            raise KeyboardInterrupt
