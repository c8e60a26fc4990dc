"""Namespaces: entering that of another process, and seeing our own processes in /proc."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from . import libc
from .process import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    MS_SLAVE,
    mount,
    unshare,
)

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

__all__ = [
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "enter",
    "enter_own_folder",
    "go_back",
    "mount_own_proc",
    "sees_all",
    "unshare",
]


def enter(path: str, kind: int) -> None:
    """Be in the namespace of that file (`/proc/PID/ns/net`) from now on; setns(2)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter {path}: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def enter_own_folder(path: str, size_bytes: int) -> int:
    """In a mount namespace of our own, have an empty tmpfs at `path`, as large as that at most.

    What is mounted or unmounted outside later, is so inside, too (mount_namespaces(7), slaves).
    The calling thread's alone. A descriptor of the namespace it was in (`go_back`). Raises OSError.
    """
    outside = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNS)
        mount("none", "/", "", MS_REC | MS_SLAVE)
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size_bytes}")
    except BaseException:
        os.close(outside)
        raise
    return outside


def go_back(outside: int) -> None:
    """Enter a mount namespace again, and the directory we are in; closes the descriptor.

    Raises OSError: EPERM for a user namespace's root, who may not leave what is its own.
    """
    here = os.getcwd()
    try:
        enter(f"/proc/self/fd/{outside}", CLONE_NEWNS)
        os.chdir(here)
    finally:
        os.close(outside)


def sees_all() -> bool:
    """Whether we are in the first PID namespace, and have rights to look at every process."""
    first = os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC  # PROC_PID_INIT_INO
    return first and os.geteuid() == 0


def mount_own_proc() -> None:
    """As the first process of a PID namespace, in a mount namespace of our own: have its /proc."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
