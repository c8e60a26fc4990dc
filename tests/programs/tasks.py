"""What the workers of a pool do; in a module of its own, so that all of them find the same one."""

from typing import Any

begun: Any = None
go: Any = None
constant: Any = None


def take(*shared: Any) -> None:
    """In each worker."""
    global begun, go, constant
    begun, go, constant = shared


def work(number: int) -> int:
    """Half of it before the word, half of it after."""
    half = sum(i * i for i in range(number))
    begun.release()
    assert go.wait(60)
    return half + int(constant.get_value())


def square(number: int) -> int:
    return number * number
