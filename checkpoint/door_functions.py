"""What a visit calls inside an interpreter, and where that is: functions of CPython and of libc."""

from __future__ import annotations

from typing import Final

from . import proc
from .door_machine import FUNCTIONS, OF_LIBC, OF_PYTHON
from .errors import Unsupported
from .proc import Vma
from .symbols import Library, file_name, libraries

_OPTIONAL: Final = ("malloc_trim",)


def find_functions(pid: int, vmas: list[Vma]) -> tuple[dict[str, int], str]:
    """Addresses of the functions called inside, and the path of the interpreter.

    Unsupported for what is no CPython from 3.8 on.
    """
    likely = sorted(vmas, key=lambda vma: "python" not in file_name(vma.path))
    python = next(filter(lambda it: it.function(OF_PYTHON[1]), libraries(pid, likely)), None)
    if python is None:
        raise Unsupported(
            f"pid {pid} ({proc.stat(pid)[1]}) runs no CPython that lzy could ask",
            remedy="only interpreters that export the C interface of Python can be asked",
            pid=pid,
        )
    if not python.function("PyConfig_InitPythonConfig"):  # came with Python 3.8
        raise Unsupported(
            f"pid {pid} runs a Python before 3.8 ({file_name(python.path)})",
            remedy="lzy asks Python 3.8 and later",
            pid=pid,
        )
    found = _look_up(OF_PYTHON, [python])
    found |= _look_up(OF_LIBC, list(libraries(pid, [v for v in vmas if is_libc(v.path)])))
    missing = [name for name in FUNCTIONS if not found.get(name) and name not in _OPTIONAL]
    if missing:
        raise Unsupported(
            f"pid {pid} has no {', '.join(missing)} in its libraries",
            remedy="only dynamically linked interpreters can be asked",
            pid=pid,
        )
    if "xsave" not in proc.cpu_features():
        raise Unsupported("this processor has no XSAVE", remedy="use a newer machine", pid=pid)
    return found, python.path


def _look_up(names: tuple[str, ...], places: list[Library]) -> dict[str, int]:
    return {
        name: next(filter(None, (library.function(name) for library in places)), 0)
        for name in names
    }


def is_libc(path: str) -> bool:
    name = file_name(path)
    return name.startswith(("libc.so", "libc-", "libpthread", "ld-musl"))
