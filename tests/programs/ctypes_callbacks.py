"""C code in the middle of calling back into Python: qsort waits in a comparison."""

import ctypes
import functools
import threading
from typing import Any

from clib import libc
from dialogue import Proof, converse, ends

Compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
NUMBERS = [(n * 7919) % 1009 for n in range(1000)]


class Record(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("next", ctypes.c_void_p), ("name", ctypes.c_char * 16))


def main() -> None:
    half_way, go_on, calls = threading.Event(), threading.Event(), 0
    array = (ctypes.c_int * len(NUMBERS))(*NUMBERS)

    @Compare
    def compare(left: Any, right: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3000:
            half_way.set()
            go_on.wait()
        return left[0] - right[0]

    def sort() -> None:
        libc.qsort(array, ctypes.c_size_t(len(array)), ctypes.c_size_t(4), compare)

    sorting = threading.Thread(target=sort)
    sorting.start()
    half_way.wait()
    records = (Record * 50)()
    for n, record in enumerate(records):
        record.number, record.name = n, b"record %d" % n
        record.next = ctypes.addressof(records[(n + 1) % 50])
    doubler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(lambda value: value * 2)

    @functools.cache
    def prove() -> Proof:
        proof: Proof = {"half way": calls == 3000 and list(array) != sorted(NUMBERS)}
        go_on.set()
        proof["sort ends"] = ends(sorting)
        proof["sorted"] = list(array) == sorted(NUMBERS)
        record, seen = records[0], []
        for _ in range(50):
            seen.append((record.number, record.name))
            record = Record.from_address(record.next)
        proof["linked"] = seen == [(n, b"record %d" % n) for n in range(50)]
        proof["called from C"] = doubler("ab") == "abab"
        again = (ctypes.c_int * len(NUMBERS))(*NUMBERS)
        libc.qsort(again, ctypes.c_size_t(len(again)), ctypes.c_size_t(4), compare)
        proof["sorts again"] = list(again) == sorted(NUMBERS)
        return proof

    converse(prove, lambda: records.__setitem__(7, Record()))


main()
