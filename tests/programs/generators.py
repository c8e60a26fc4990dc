"""Generators, coroutines, iterators and context managers, half-way; they go on where they were."""

import contextlib
import functools
import io
import itertools
import random
import re
import sys
from collections.abc import Generator, Iterator
from typing import Any

from dialogue import Proof, converse


def count_down(n: int) -> Generator[int, int, str]:
    while n > 0:
        n -= (yield n) or 1
    return "liftoff"


def delegate() -> Generator[Any, Any, str]:
    try:
        return (yield from count_down(10)) + "!"
    finally:
        log.append("finally")


async def nested() -> str:
    return "".join([await Pause("a"), await Pause("b")])


class Pause:
    def __init__(self, name: str) -> None:
        self.name = name

    def __await__(self) -> Generator[str, str, str]:
        return (yield self.name)


@contextlib.contextmanager
def guarded() -> Iterator[str]:
    log.append("enter")
    try:
        yield "inside"
    except KeyError as error:
        log.append(f"caught {error}")


def primes() -> Iterator[int]:
    found: list[int] = []
    for n in itertools.count(2):
        if all(n % p for p in found):
            found.append(n)
            yield n


log: list[str] = []


def main() -> None:
    delegated = delegate()
    first = [next(delegated), delegated.send(3)]
    coroutine = nested()
    paused = coroutine.send(None)
    guard = guarded()
    inside = guard.__enter__()
    numbers = random.Random(5)
    drawn = [numbers.random() for _ in range(100)]
    prime = primes()
    small = list(itertools.islice(prime, 500))
    pairs = zip(itertools.cycle("xyz"), itertools.accumulate(itertools.count(1)), strict=False)
    ahead = [next(pairs) for _ in range(7)]
    matches = re.finditer(r"\d+", " ".join(map(str, range(1000))))
    seen = [next(matches).group() for _ in range(400)]
    text = io.StringIO("".join(f"line {n}\n" for n in range(100)))
    lines = [next(text) for _ in range(50)]
    backwards = reversed(range(1000))
    dropped = [next(backwards) for _ in range(10)]
    by_size = {n: str(n) for n in range(1000)}
    keys = iter(by_size)
    walked = [next(keys) for _ in range(10)]

    @functools.cache
    def prove() -> Proof:
        proof: Proof = {}
        proof["delegated"] = [*first, *list_of(delegated)] == [10, 7, 6, 5, 4, 3, 2, 1, "liftoff!"]
        steps = [paused, coroutine.send("1")]
        try:
            coroutine.send("2")
        except StopIteration as stop:
            steps.append(stop.value)
        proof["coroutine"] = steps == ["a", "b", "12"]
        handled = guard.__exit__(*raised(KeyError("k")))
        proof["guard"] = handled is True and inside == "inside"
        proof["log"] = log == ["enter", "finally", "caught 'k'"]
        fresh = random.Random(5)
        rest = [numbers.random() for _ in range(100)]
        proof["random"] = drawn + rest == [fresh.random() for _ in range(200)]
        proof["primes"] = small[-1] == 3571 and next(prime) == 3581
        proof["zip"] = len(ahead) == 7 and next(pairs) == ("y", 36)
        proof["finditer"] = len(seen) == 400 and next(matches).group() == "400"
        proof["lines"] = len(lines) == 50 and next(text) == "line 50\n"
        proof["reversed"] = len(dropped) == 10 and next(backwards) == 989
        proof["dict"] = len(walked) == 10 and next(keys) == 10
        return proof

    converse(prove, lambda: next(prime))


def list_of(generator: Generator[Any, Any, str]) -> list[Any]:
    items: list[Any] = []
    while True:
        try:
            items.append(next(generator))
        except StopIteration as stop:
            return [*items, stop.value]


def raised(error: Exception) -> tuple[Any, Any, Any]:
    try:
        raise error
    except Exception:
        return sys.exc_info()


main()
