"""A call that runs beside its caller's own work: for what the kernel takes milliseconds to tell."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """Begins `call` in a thread of its own; `result` waits for it.

    Only what lets go of the GIL for long gains by it. A result that nobody asks for is forgotten.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """What the call answered; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]
