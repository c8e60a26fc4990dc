"""What the machine can do without lzy, measured in the same run: the floor under every figure.

`python floors.py NAME [ARGUMENT…]` prints one JSON list of samples; a process of its own for each,
so that the benchmarks' process stays as small as a resident lzy is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

_SAMPLES = 5
_BLOCK_BYTES = 256 << 10


def memory_copy() -> list[float]:
    """Bytes a second of copying 64 MiB, both sides in memory already."""
    source = bytearray(os.urandom(1 << 20)) * 64
    target = bytearray(len(source))
    return [len(source) / _seconds(lambda: target.__setitem__(slice(None), source))] + [
        len(source) / _seconds(lambda: target.__setitem__(slice(None), source))
        for _ in range(_SAMPLES - 1)
    ]


def disk_write(folder: str, length_bytes: str) -> list[float]:
    """Bytes a second of writing random bytes to a new file, fsync(2) included."""
    block = os.urandom(8 << 20)
    samples = []
    for number in range(_SAMPLES):
        path = os.path.join(folder, f"floor-{number}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:

            def write(descriptor: int = descriptor) -> None:
                for _ in range(int(length_bytes) // len(block)):
                    os.write(descriptor, block)
                os.fsync(descriptor)

            samples.append(int(length_bytes) // len(block) * len(block) / _seconds(write))
        finally:
            os.close(descriptor)
            os.unlink(path)
    return samples


def zstd(kind: str, length_bytes: str) -> list[float]:
    """Bytes a second of zstd level 1, one thread, in blocks of 256 KiB, over memory of a kind."""
    import zstandard

    content = _content(kind, int(length_bytes))
    compressor = zstandard.ZstdCompressor(level=1)

    def compress() -> None:
        for start in range(0, len(content), _BLOCK_BYTES):
            compressor.compress(content[start : start + _BLOCK_BYTES])

    return [len(content) / _seconds(compress) for _ in range(3)]


def zstd_share(kind: str, length_bytes: str) -> list[float]:
    """What zstd level 1 leaves of it, in blocks of 256 KiB."""
    import zstandard

    content = _content(kind, int(length_bytes))
    compressor = zstandard.ZstdCompressor(level=1)
    packed = sum(
        len(compressor.compress(content[start : start + _BLOCK_BYTES]))
        for start in range(0, len(content), _BLOCK_BYTES)
    )
    return [packed / len(content)]


def round_trip() -> list[float]:
    """Seconds of one byte there and back between two processes: a fault needs as much."""
    there, back = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there[1])
        while os.read(there[0], 1):
            os.write(back[1], b"x")
        os._exit(0)

    def go() -> None:
        os.write(there[1], b"x")
        os.read(back[0], 1)

    go()
    samples = [_seconds(go) for _ in range(2000)]
    os.close(there[1])
    os.waitpid(child, 0)
    samples.sort()
    return samples[len(samples) // 10 :: len(samples) // _SAMPLES]


def python_start() -> list[float]:
    """Seconds of `python -c pass`, as the lzy command's interpreter."""
    command = [sys.executable, "-c", "pass"]
    return [_seconds(lambda: subprocess.run(command, check=True)) for _ in range(9)]


def _content(kind: str, length_bytes: int) -> memoryview:
    """Memory as `subject` makes it, columns one after the other."""
    import numpy as np
    from subject import blocks, make_memory

    return memoryview(np.concatenate(list(blocks(make_memory(kind, length_bytes)))).tobytes())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, *arguments: str) -> list[float]:
    """Samples of a floor, from a process of its own."""
    command = [sys.executable, __file__, name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300)
    samples: list[float] = json.loads(done.stdout)
    return samples


FLOORS: dict[str, Callable[..., list[float]]] = {
    "memory_copy": memory_copy,
    "disk_write": disk_write,
    "zstd": zstd,
    "zstd_share": zstd_share,
    "round_trip": round_trip,
    "python_start": python_start,
}

if __name__ == "__main__":
    print(json.dumps(FLOORS[sys.argv[1]](*sys.argv[2:])))
