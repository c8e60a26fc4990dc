"""The namespaces that lzy made for a copy: which those are, and how to get into them.

A process in them can be dumped from inside them only. Apart from `fork`, which makes them, for
every dump looks whether there are any.
"""

from __future__ import annotations

import os

from . import proc
from .errors import NotFound

_INIT = "/memfd:lzy-init (deleted)"  # what `birth` makes the first process of a namespace of


def enter_copy(pid: int) -> bool:
    """If lzy made namespaces for `pid` enter them, since only from there it can be dumped.

    Those are the network of a copy that lives apart, its /dev/shm, and the users of what was
    restored without root. Whether there are any. The calling thread's namespaces change; of
    containers and the like nothing is entered. Precondition: the process has one thread.
    """
    try:
        first = init_of(pid)
        if not first or os.readlink(f"/proc/{first}/exe") != _INIT:
            return False
        from .linux.network import join_apart  # for a copy alone

        other = [name for name in ("user", "net", "ipc") if not _is_ours(pid, name)]
        if "user" in other and os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        join_apart(pid, other)
        # Not that of a node that has its own /proc: there the numbers would be other ones.
        same_proc = os.stat(f"/proc/{first}/root/proc").st_dev == os.stat("/proc").st_dev
        if same_proc and not _is_ours(first, "mnt"):
            here = os.getcwd()
            join_apart(first, ["mnt"])
            os.chdir(here)
            return True
        return bool(other)
    except (NotFound, FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it has gone, or is nobody's whom we may enter: the dump tells


def _is_ours(pid: int, namespace: str) -> bool:
    path = f"/proc/self/ns/{namespace}"
    return os.stat(f"/proc/{pid}/ns/{namespace}").st_ino == os.stat(path).st_ino


def init_of(pid: int) -> int:
    """The first process of its PID namespace, as we see it; 0 if we do not."""
    above = pid
    while above and int(proc.status(above)["NSpid"].split()[-1]) != 1:
        above = int(proc.stat(above)[3])
    return above
