"""An interpreter of any version from 3.8 on: threads, generators, collections, imports."""

import collections
import decimal
import gc
import hashlib
import json
import sys
import threading
import time
import weakref

from dialogue import PATIENCE_S, converse


def fibonacci():
    a, b = 0, 1
    while True:
        yield a
        a, b = b, a + b


class Node:
    def __init__(self, value, below=None):
        self.value, self.below = value, below


def main():
    numbers = fibonacci()
    head = [next(numbers) for _ in range(300)]
    chain = None
    for n in range(20000):
        chain = Node(n, chain)
    observed = weakref.ref(chain)
    table = collections.OrderedDict((str(n), n) for n in range(5000))
    lock, counted = threading.Lock(), [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            with lock:
                counted[0] += 1
            time.sleep(0.0005)

    threads = [threading.Thread(target=count, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    running = hashlib.sha256(b"before")
    version = sys.version

    def prove():
        proof = {}
        again = fibonacci()
        expected = [next(again) for _ in range(300)]
        proof["generator"] = head == expected and next(numbers) > head[-1]
        total, node = 0, chain
        while node:
            total, node = total + node.value, node.below
        proof["chain"] = total == sum(range(20000))
        gc.collect()
        proof["weak reference"] = observed() is chain
        proof["table"] = list(table.items())[4999] == ("4999", 4999)
        before, deadline = counted[0], time.monotonic() + PATIENCE_S
        while counted[0] < before + 10 and time.monotonic() < deadline:
            time.sleep(0.001)
        proof["threads count on"] = counted[0] >= before + 10
        both = running.copy()
        both.update(b"after")
        proof["hash"] = both.hexdigest() == hashlib.sha256(b"beforeafter").hexdigest()
        decimal.getcontext().prec = 50
        proof["decimal"] = str(decimal.Decimal(2).sqrt()).startswith(
            "1.4142135623730950488016887242"
        )
        import fractions  # Not imported before: files are read, code is compiled.

        proof["imports"] = fractions.Fraction(1, 3) * 3 == 1
        proof["version"] = version == sys.version
        proof["json"] = json.loads(json.dumps(list(range(99)))) == list(range(99))
        return proof

    converse(prove, lambda: next(numbers) and head.append(1))
    stop.set()


main()
