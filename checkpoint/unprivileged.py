"""Restoring without root: in a user and a PID namespace of one's own, where pids may be chosen.

An ordinary user may make a user namespace, and has in it the rights that a restore needs: chosen
pids, clocks, /proc. What needs rights over the whole machine stays out of reach: userfaultfd(2) for
faults that the kernel takes itself and for forks. So all memory is loaded before the process runs.
A process restored so has no rights there that it had not before, and is dumped as any other of
that user's: lzy then enters its user namespace.
"""

from __future__ import annotations

import os
from typing import Any

from . import proc
from .errors import AccessDenied, Incompatible
from .linux.process import may_choose_pids
from .linux.users import enter_own_users

SAID = (
    "without root: it lives in a user and a PID namespace of its own, and all of its memory was "
    "loaded at once"
)


def enter_if_needed(document: dict[str, Any], name: str, pid_namespace: str) -> bool:
    """Enter a user namespace in which we may restore that image, unless we may anyway.

    Whether it was entered: then `document` was adapted to it, memory has to be loaded at once, and
    the PID namespace has to be a new one. Raises Incompatible when the image is of another user,
    AccessDenied when the system forbids it, or when `pid_namespace` is `host`. Precondition: the
    process has one thread.
    """
    if may_choose_pids():
        return False
    if pid_namespace == "host":
        raise AccessDenied(
            f"only root can give image {name} its pid here",
            remedy="without --pid-namespace host it lives in namespaces of its own",
        )
    own = (os.geteuid(), os.getegid())
    members = [document, *document.get("members", ())]
    threads = [thread for member in members for thread in member["threads"]]
    for thread in threads:
        rights = thread["rights"]
        for key, ours in zip(("Uid", "Gid"), own, strict=True):
            if set(map(int, rights[key].split())) != {ours}:
                raise Incompatible(
                    f"image {name} is of a process with {key.lower()} {rights[key].split()[0]}; "
                    f"without root only one's own can be restored (yours is {ours})",
                    remedy="restore it as root, or as the user that it belongs to",
                )
        if any(int(rights[key], 16) for key in ("CapEff", "CapPrm", "CapInh", "CapAmb")):
            raise Incompatible(
                f"image {name} is of a process with capabilities, which only root can give",
                remedy="restore it as root",
            )
    had = {frozenset(map(int, thread["rights"]["Groups"].split())) for thread in threads}
    if had - {frozenset(os.getgroups())}:
        raise Incompatible(
            f"image {name} is of a process with other groups than yours, which only root can give",
            remedy="log in with the groups that it had, or restore it as root",
        )
    try:
        enter_own_users()
    except OSError as error:
        raise AccessDenied(
            f"cannot restore without root: user namespaces are refused ({error.strerror})",
            remedy="allow them (user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns), or run lzy as root",
        ) from error
    seen = proc.status(os.getpid())["Groups"]  # those without a number here all look alike
    for thread in threads:
        thread["rights"]["Groups"] = seen
    return True
