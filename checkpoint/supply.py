"""Where a pager's pages come from: the image, and the readers who read it ahead and install.

The image may be away for a while and is opened anew; readers may be killed and are replaced. What
they have installed is taken note of here, at the latest before an event is applied, while the fence
is closed for that (`lzy.checkpoint.fence`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from .contexts import Context
from .fence import Fence
from .readahead import Goal, Readahead, Slot
from .windows import ChunkSource, Windows

_FENCE_PATIENCE_S = 0.5
_AHEAD_BYTES = 4 << 20  # read, authenticated and not yet installed, at most
_MOST_READERS = 2  # the pager itself wants a core, and two read as fast as it installs


class Supply:
    """The image of one restored process, once it could be opened, and its readers, once begun.

    `windows` and `readahead` are None until then. `open_image` opens the image anew;
    `journal_fd` is what the fence is made of. `installed_bytes`: what readers have installed.
    """

    def __init__(
        self,
        image: ChunkSource | None,
        open_image: Callable[[], ChunkSource],
        journal_fd: int,
        log: Callable[[str], None],
    ) -> None:
        self._open_image = open_image
        self._journal_fd = journal_fd
        self._log = log
        self.windows = Windows(image) if image is not None else None
        self.readahead: Readahead | None = None
        self.installed_bytes = 0
        self._fence: Fence | None = None
        self._main: Context | None = None  # whose memory readers install

    def reopen(self) -> None:
        """Serve from the image opened anew, without readers yet; else LzyError or OSError."""
        image = self._open_image()
        self.close()
        self.windows = Windows(image)

    def close(self) -> None:
        """Let go of readers and image."""
        self.end_readers()
        if self.windows is not None:
            self.windows.image.close()
            self.windows = None

    # -- the readers

    def make_fence(self) -> None:
        """Have readers install, too, if there can be a fence; before the first message is read."""
        with contextlib.suppress(OSError):  # then readers only read
            self._fence = Fence(self._journal_fd)

    def begin_readers(
        self, windows: Windows, main: Context | None, private: Iterable[int]
    ) -> Readahead:
        """Have others read, and install the pages of `main`; `private`: what they must not hold."""
        withheld = set(private)
        if main is None or self._fence is None:
            withheld.add(self._journal_fd)
        else:  # the readers install
            withheld.discard(main.uffd.fd)
        self._main = main
        self.readahead = Readahead(
            windows.image,
            max(4, _AHEAD_BYTES // windows.length),
            windows.length,
            withheld,
            readers=min(os.cpu_count() or 1, _MOST_READERS),
            fence=self._fence,
            uffd=main.uffd if main is not None else None,
        )
        return self.readahead

    def end_readers(self) -> None:
        """End those who read ahead, and with them whoever but us could install anything."""
        if self.readahead is not None:
            self.readahead.close()
            self.readahead = None

    def close_fence(self) -> Fence | None:
        """Keep readers from installing anything: what is read next may change what goes where.

        None when there is none to be opened again: then there are no readers either.
        """
        fence = self._fence
        try:
            if fence is None or fence.close(_FENCE_PATIENCE_S):
                return fence
            self._log("a reader does not go on; starting others")
        except OSError as error:
            self._log(f"readers install nothing any more: {error}")
            self._fence = None
        self.end_readers()
        return None

    # -- what they have done

    def is_installed(self, number: int) -> bool:
        """Whether a reader has installed window `number`, though we have not taken note yet."""
        return self.readahead is not None and self.readahead.is_installed(number)

    def note_installed(self) -> None:
        """Take note of all that readers have installed. Precondition: the fence is closed."""
        if self.readahead is not None:
            for goal in self.readahead.installed():
                self._reached(goal)

    def take(self, number: int) -> Slot | None:
        """What was read ahead for window `number`, to be given back; None if it is not there.

        A reader that has installed it leaves none: then less is missing now.
        """
        readahead = self.readahead
        slot = readahead.take(number) if readahead is not None else None
        if slot is not None and readahead is not None and slot.installed is not None:
            self._reached(slot.installed)
            readahead.give_back(slot)
            return None
        return slot

    def release(self, number: int) -> None:
        """What was read ahead for window `number`, if it was, is not needed any more."""
        slot = self.take(number)
        if slot is not None and self.readahead is not None:
            self.readahead.give_back(slot)

    def _reached(self, goal: Goal) -> None:
        """A reader has installed this, and no event was read since it was told to."""
        self.installed_bytes += sum(length for _, _, length in goal.parts)
        if self._main is not None:
            self._main.missing.forget(goal.low, goal.high)
