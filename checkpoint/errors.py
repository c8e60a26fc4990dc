"""The one tree of errors that lzy raises.

LzyError                  anything lzy raises on purpose                     exit status 1
├── NotFound              no such process, image or store                    3
├── Unsupported           the process has something lzy cannot make again    4
├── AccessDenied          the kernel or the file system said no              5
├── Damaged               stored bytes are not what was written              6
├── Incompatible          this machine cannot carry that image               7
├── Busy                  somebody else holds it now; trying later helps     8
├── StoreUnavailable      the store cannot be read or written now            9
└── KernelError           a system call failed where none should             10

A message says what was being done, to what, and what the system answered; `remedy` says what to
do next. Facts (pid, address, descriptor, path, …) are kept as attributes in `facts`.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar


class LzyError(Exception):
    """Base of all errors of lzy: `message`, `remedy` (may be empty) and `facts`."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.facts = facts

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class NotFound(LzyError):
    """There is no such process, image or store."""

    exit_status = 3


class Unsupported(LzyError):
    """The process holds something that lzy cannot make again; nothing was changed."""

    exit_status = 4


class AccessDenied(LzyError):
    """The kernel or the file system refused access."""

    exit_status = 5


class Damaged(LzyError):
    """Stored bytes are not what was written: damaged, truncated or forged."""

    exit_status = 6


class Incompatible(LzyError):
    """This machine lacks what the image needs (CPU features, files, kernel)."""

    exit_status = 7


class Busy(LzyError):
    """Somebody else holds the thing now; trying later helps."""

    exit_status = 8


class StoreUnavailable(LzyError):
    """The store cannot be read or written at present (disk full, folder away)."""

    exit_status = 9


class KernelError(LzyError):
    """A system call failed where none should; `errno` tells how."""

    exit_status = 10

    def __init__(self, message: str, errno: int, *, remedy: str = "", **facts: Any) -> None:
        super().__init__(f"{message}: {os.strerror(errno)}", remedy=remedy, **facts)
        self.errno = errno
