"""A running process, with all its descendants, into an image: what can be told before it begins.

*Guarantee*: a dump that fails or is killed leaves the processes running, untouched.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import mapping_flags, proc, tracking
from .away import Doze, NotAsItIs, find_doze
from .capture import COPY_LIMIT_BYTES, Capture, DumpReport, Wishes
from .content import intersect, join_ranges, own_page_ranges
from .errors import Busy, LzyError, Unsupported
from .fitness import PASSES_WITHIN_S, PAUSE_S, Progress, refuse_unfit
from .history import ASKED
from .tree import refuse_ourselves
from .unfinished import close_unfinished

if TYPE_CHECKING:
    from .store import Store

__all__ = ["DumpReport", "dump"]


def dump(
    pid: int,
    store: Store,
    *,
    name: str | None = None,
    leave_running: bool = False,
    window_pages: int = 64,
    why: str = ASKED,
    track: bool = True,
    trim: bool = False,
    rouse: bool = True,
    carry_files: bool = False,
    carry: Sequence[str] = (),
    take_down: bool = True,
    verified: str = "",
    progress: Progress | None = None,
) -> DumpReport:
    """Write an image of process `pid` and its descendants into `store`.

    They are ended unless `leave_running`.

    `name` is that of a session: the image is its next checkpoint (see `history`). `why` it is
    taken stands in the image.

    If the kernel has kept account of what was written since an image in `store` was taken of the
    process, only that is read and stored. One that is left running is put under account, unless
    `track` is false.

    With `trim` its interpreter is asked to give back what it does not need first; what it has then
    stands in the image. If it is busy a note says so, and the dump goes on.

    One that dozes and cannot be dumped as it is, or would stand still too long, gets all of its
    memory back first; unless `rouse` is false: then it does stand still, or Busy is raised.

    `carry_files`: mapped files travel in the image, too, and so do the files and folders of
    `carry`, whoever has them open (see `carried`).

    Processes that are ended are gone when this returns. Unless `take_down` their memory may not be:
    then it goes when ours does (see `remains`).

    `verified`: an image of `store` of which all was just read and found right; what is taken from
    it is not read once more.

    What is just on its way somewhere where it cannot be seen (see `Opened.refusal`) gets a
    second and a half to arrive.

    Raises NotFound, AccessDenied, Unsupported (naming what cannot be kept), Busy,
    StoreUnavailable; the process then runs on as before.
    """
    began = time.monotonic()
    notes: list[str] = []
    variables: dict[str, Any] = {}

    refuse_unfit(pid)
    refuse_ourselves(pid)
    close_unfinished(pid)
    if trim:
        from .belongings import trim_if_idle

        variables = trim_if_idle(pid, notes)

    wishes = Wishes(
        name, leave_running, window_pages, why, track, carry_files, tuple(carry), progress,
        take_down, verified,
    )  # fmt: skip

    def write(doze: Doze | None) -> DumpReport:
        tries_until, said = time.monotonic() + PASSES_WITHIN_S, len(notes)
        while True:
            capture = Capture(pid, store, wishes, doze=doze, variables=variables, notes=notes)
            try:
                return capture.run()._replace(total_s=time.monotonic() - began)
            except Unsupported as error:
                if not error.facts.get("passes") or time.monotonic() > tries_until:
                    raise
            del notes[said:]
            time.sleep(PAUSE_S)  # it runs meanwhile

    doze = _find_fit_doze(pid, store, window_pages, leave_running and rouse)
    if doze and not proc.children(pid):
        with contextlib.suppress(NotAsItIs):
            return write(doze)
    if not rouse and find_doze(pid):
        raise Busy(
            f"pid {pid} cannot be dumped before all of its memory is back",
            remedy=f"run: lzy rouse {pid}",
            pid=pid,
        )
    return write(None)


def _find_fit_doze(pid: int, store: Store, window_pages: int, quick: bool) -> Doze | None:
    """How the process dozes, if it can be dumped as it is; `quick`: standing still but shortly."""
    doze = find_doze(pid)
    if doze is None or os.path.realpath(doze.store) != os.path.realpath(store.path):
        return None
    try:
        with store.load(doze.image) as image:
            if image.window_pages != window_pages:
                return None
    except LzyError:
        return None
    if quick:
        vmas = mapping_flags.mappings(pid)
        there = join_ranges(own_page_ranges(pid, vmas))
        written = intersect(there, join_ranges(tracking.written_ranges(pid, vmas)))
        if sum(end - start for start, end in written) > COPY_LIMIT_BYTES:
            return None
    return doze
