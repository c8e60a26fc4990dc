"""Namespaces: entering that of another process, and seeing our own processes in /proc."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from . import libc
from .process import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, mount, unshare

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

__all__ = ["CLONE_NEWNET", "CLONE_NEWNS", "CLONE_NEWPID", "enter", "mount_own_proc", "unshare"]


def enter(path: str, kind: int) -> None:
    """Be in the namespace of that file (`/proc/PID/ns/net`) from now on; setns(2)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter {path}: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def mount_own_proc() -> None:
    """As the first process of a PID namespace, in a mount namespace of our own: have its /proc."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
