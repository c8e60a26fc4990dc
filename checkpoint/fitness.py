"""Which processes can be dumped, as far as /proc tells, and when: after their pager has left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import mapping_flags, proc
from .errors import Busy, NotFound, Unsupported
from .filters import refuse_unsuspendable
from .home import run_directory
from .journal import is_held, journal_path, rouse
from .linux import process
from .linux.uffd import keeps_account
from .proc import Vma
from .tracee import Tracee, traced_by

Progress = Callable[[str, int, int], None]

PAGER_NAME = "lzy-pager"  # as `pager` calls itself
PASSES_WITHIN_S, PAUSE_S = 1.5, 0.013
"""How long what goes by itself is waited for, and how often looked at; see `Opened.refusal`."""
_BUSY_PAGER_LEAVES_S = 30.0  # more, while one is seen to live
_PAGER_LEAVES_S = 2.0  # after the last page: the close it injects, and its detaching


def refuse_unfit(pid: int) -> None:
    """Raise for a process that lzy cannot dump, from /proc alone."""
    if pid == os.getpid():
        raise Unsupported("lzy cannot dump itself", remedy="dump it from another process", pid=pid)
    if pid == 1:
        raise Unsupported(
            "pid 1 is the first process of this system or container, with which all others end",
            remedy="choose a program; of a container, run lzy outside of it",
            pid=pid,
        )
    witness = proc.witness(pid)
    status = proc.status(witness)
    if int(status["Tgid"]) != pid:
        raise NotFound(
            f"{pid} is a thread of process {status['Tgid']}",
            remedy=f"dump process {status['Tgid']}",
            pid=pid,
        )
    if witness != pid:
        _refuse_unreachable(pid)
    if status["State"].startswith(("Z", "X")):
        raise NotFound(f"process {pid} has ended (a zombie is left of it)", pid=pid)
    if proc.is_ending(pid):
        raise NotFound(f"process {pid} is ending", pid=pid)
    if not proc.read_bytes(witness, "cmdline") and "VmSize" not in status:
        raise Unsupported(f"pid {pid} is a kernel thread", remedy="choose a program", pid=pid)
    if (tracer := int(status["TracerPid"])) and not _is_pager(tracer):
        raise traced_by(pid, tracer)
    refuse_unsuspendable(pid, status)
    for namespace in ("user", "net", "ipc", "uts"):
        try:
            theirs = os.stat(f"/proc/{witness}/ns/{namespace}").st_ino
        except PermissionError:
            continue
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NotFound(f"process {pid} has ended", pid=pid) from error
        if theirs != os.stat(f"/proc/self/ns/{namespace}").st_ino:
            raise Unsupported(
                f"pid {pid} lives in another {namespace} namespace (a container?)",
                remedy="run lzy inside that container",
                pid=pid,
            )


def _refuse_unreachable(pid: int) -> None:
    """Raise Unsupported if this kernel lets nobody reach descriptors by another thread."""
    try:
        os.close(proc.open_shared(pid))
    except ProcessLookupError as error:
        raise NotFound(f"process {pid} has ended", pid=pid) from error
    except OSError as error:
        raise Unsupported(
            f"the main thread of pid {pid} has ended while others live ({error.strerror})",
            remedy="such a process can be dumped under Linux 6.9 or later",
            pid=pid,
        ) from error


def refuse_separate_threads(tracee: Tracee) -> None:
    """Raise Unsupported if threads have descriptors or a directory of their own, unshare(2)."""
    for tid in tracee.threads:
        for what, name in (
            (process.KCMP_FILES, "descriptors"),
            (process.KCMP_FS, "a working directory"),
        ):
            if tid != tracee.witness and not process.is_shared(tracee.witness, tid, what):
                raise Unsupported(
                    f"thread {tid} of pid {tracee.pid} has {name} of its own (unshare)",
                    remedy="such a thread cannot be made again yet; end it and try again",
                    pid=tracee.pid,
                )


def wait_for_pager(pid: int, progress: Progress | None) -> tuple[bytes, list[Vma]]:
    """Wait until memory that a lazy restore still brings in is all there; the mappings then.

    As `mapping_flags.look` has them. Raises Busy if nothing arrives: the pager died.
    """
    last, moved_at = -1, time.monotonic()
    leaves_until = moved_at + _PAGER_LEAVES_S
    journal = journal_path(run_directory(), pid)
    with contextlib.suppress(NotFound, OSError):  # none, or another user's
        rouse(journal)  # should it doze, what is missing is wanted now
    while True:
        places, vmas = mapping_flags.look(pid)
        missing = sum(vma.length for vma in vmas if "um" in vma.flags)
        if not missing:
            if not _pager_is_leaving(pid):
                return places, vmas
            waited_s = time.monotonic() - leaves_until
            if waited_s > (_BUSY_PAGER_LEAVES_S if _is_served(journal) else 0):
                return places, vmas
            time.sleep(0.005)
            continue
        if journal.exists() and not is_held(journal):
            raise Busy(
                f"memory of pid {pid} is not all there, and its pager has died",
                remedy=f"run: lzy pager --resume {pid}",
                pid=pid,
            )
        present = int(proc.status(proc.witness(pid)).get("RssAnon", "0").split()[0])
        now = time.monotonic()
        leaves_until = now + _PAGER_LEAVES_S
        if present != last:
            last, moved_at = present, now
        elif now - moved_at > 10:
            raise Busy(
                f"memory of pid {pid} is still being brought in by a pager, which does not move",
                remedy=f"run: lzy pager --resume {pid}",
                pid=pid,
            )
        if progress:
            progress("waiting for the pager", present << 10, missing)
        time.sleep(0.02)


def _is_served(journal: Path) -> bool:
    """Whether a living pager has the journal: it leaves, be the machine however busy."""
    with contextlib.suppress(NotFound, OSError):
        return journal.exists() and is_held(journal)
    return False


def _pager_is_leaving(pid: int) -> bool:
    """Whether the pager has yet to close its descriptor in the process, or to let go of it.

    A userfaultfd of the program's own looks the same: it is refused by name a little later.
    """
    witness = proc.witness(pid)
    if _is_pager(int(proc.status(witness)["TracerPid"])):
        return True
    with contextlib.suppress(OSError):  # not ours to look at: the dump tells
        for number in os.listdir(f"/proc/{witness}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it has closed that one
                if os.readlink(
                    f"/proc/{witness}/fd/{number}"
                ) == "anon_inode:[userfaultfd]" and not keeps_account(
                    proc.read_bytes(witness, f"fdinfo/{number}").decode()
                ):
                    return True
    return False


def _is_pager(tracer: int) -> bool:
    """Whether the process `tracer` (0: none) is an lzy pager, in the midst of its last call."""
    try:
        return bool(tracer) and proc.stat(tracer)[1] == PAGER_NAME
    except NotFound:  # it has let go since
        return True
