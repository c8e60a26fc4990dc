"""A user namespace of one's own, user_namespaces(7): there an ordinary user has capabilities."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from . import syscall
from .layouts import pack_capabilities, pack_capability_header
from .process import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, SYS_CAPSET, prctl, unshare

CLONE_NEWUSER: Final = 0x10000000


def enter_own_users() -> None:
    """Leave the present user namespace for a new one, in which only we are: under our own ids.

    There we have all capabilities over namespaces that are made next, and over nothing else; what
    we execute keeps them (ambient capabilities).
    Precondition: the process has one thread. Raises OSError: EPERM where a system forbids it to
    ordinary users, ENOSPC when there are too many (user.max_user_namespaces).
    """
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (
        ("uid_map", f"{user} {user} 1"),
        ("setgroups", "deny"),  # or an ordinary user may map no group
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "wb", buffering=0) as file:
            file.write(text.encode())
    _keep_capabilities()


def _keep_capabilities() -> None:
    """Have execve(2) keep them, which takes them from who is not root; capabilities(7)."""
    with open("/proc/self/status", "rb") as file:
        held = int(next(line for line in file if line.startswith(b"CapPrm:")).split()[1], 16)
    header = ctypes.create_string_buffer(pack_capability_header())
    sets = ctypes.create_string_buffer(pack_capabilities(held, held, held))
    syscall(SYS_CAPSET, ctypes.addressof(header), ctypes.addressof(sets))
    for capability in range(64):
        if held >> capability & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)
