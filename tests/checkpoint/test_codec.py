"""Encodings of chunks: what comes back is what went in, and what does not shrink stays raw."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lzy.checkpoint import codec, planes
from lzy.checkpoint.codec import RAW, ZSTD, Decoder, Encoder
from lzy.checkpoint.errors import Damaged

WINDOW_BYTES = 262144


def content_of(kind: str, length_bytes: int = WINDOW_BYTES) -> bytes:
    """Memory as sessions have it: counters, rounded floats, categories, text, noise."""
    numbers = length_bytes // 8
    if kind == "counters":
        return struct.pack(f"<{numbers}q", *range(10**6, 10**6 + numbers))
    if kind == "cents":
        return struct.pack(f"<{numbers}d", *((i * 7919 % 9973) / 100 for i in range(numbers)))
    if kind == "categories":
        return bytes(i * i * 31 % 7 for i in range(length_bytes))
    if kind == "text":
        return (b"the quick brown fox %d " * length_bytes)[:length_bytes]
    return os.urandom(length_bytes)


def decoded(encoding: int, stored: bytes | memoryview, length_bytes: int) -> bytes:
    into = memoryview(bytearray(length_bytes))
    Decoder().decode(encoding, stored, into)
    return bytes(into)


@pytest.fixture(params=["machine code", "slices"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of taking numbers apart: the fast one and the one that works anywhere."""
    if request.param == "slices":
        monkeypatch.setattr(planes, "_routines", {})
    else:
        assert planes.fast(), "this machine runs x86-64 code but our routines were refused"
    return str(request.param)


@pytest.mark.parametrize("kind", ["counters", "cents", "categories", "text", "noise"])
@pytest.mark.parametrize("length_bytes", [4096, 65536, 3 * 4096, WINDOW_BYTES])
def test_round_trip(way: str, kind: str, length_bytes: int) -> None:
    """Every kind of content comes back bit for bit, whatever the encoder chose."""
    content = content_of(kind, length_bytes)
    encoder = Encoder()
    for _ in range(3):
        encoding, stored = encoder.encode(memoryview(bytearray(content)))
        assert decoded(encoding, stored, length_bytes) == content


def test_choices() -> None:
    """Counters are taken apart, text is not, noise is stored raw as it lies."""
    content = memoryview(bytearray(content_of("counters")))
    encoding, stored = Encoder().encode(content)
    assert encoding >> 8 in planes.WIDTHS
    assert len(stored) < len(content) // 50
    encoding, stored = Encoder().encode(content_of("text"))
    assert encoding == ZSTD
    noise = memoryview(bytearray(content_of("noise")))
    encoding, stored = Encoder().encode(noise)
    assert encoding == RAW
    assert stored is noise


def test_changes_of_content_are_noticed() -> None:
    """An encoder that has met noise for long still compresses the counters that follow."""
    encoder = Encoder()
    for _ in range(40):
        assert encoder.encode(content_of("noise", 65536))[0] == RAW
    content = content_of("counters", 65536)
    sizes = [len(encoder.encode(content)[1]) for _ in range(12)]
    assert max(sizes[8:]) < 65536 // 10, "counters after noise were still stored as they lie"
    content = content_of("cents", 65536)
    sizes = [len(encoder.encode(content)[1]) for _ in range(3)]
    assert sizes[-1] < 65536 * codec._MOST_SHARE


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_planes_agree_with_slices(data: st.DataObject) -> None:
    """The machine code does exactly what slices say, and putting together undoes it."""
    width = data.draw(st.sampled_from(planes.WIDTHS))
    blocks = data.draw(st.integers(1, 40))
    content = os.urandom(16 * width * blocks)
    apart = memoryview(bytearray(len(content)))
    again = memoryview(bytearray(len(content)))
    assert planes.fast()
    planes.take_apart(content, width, apart)
    assert bytes(apart) == b"".join(content[number::width] for number in range(width))
    planes.put_together(apart, width, again)
    assert bytes(again) == content


def test_planes_touch_nothing_beyond() -> None:
    """Bytes before and after the target stay what they were: the code keeps within its blocks."""
    for width in planes.WIDTHS:
        length_bytes = 16 * width * 5
        guarded = bytearray(b"\xa5" * (length_bytes + 256))
        inside = memoryview(guarded)[128 : 128 + length_bytes]
        planes.take_apart(os.urandom(length_bytes), width, inside)
        planes.put_together(os.urandom(length_bytes), width, inside)
        assert guarded[:128] == guarded[-128:] == b"\xa5" * 128


@pytest.mark.parametrize("width", [1, 3, 16])
def test_planes_refuse_other_shapes(width: int) -> None:
    """A width or a length that has no whole blocks is refused before any memory is touched."""
    with pytest.raises(ValueError, match="blocks"):
        planes.take_apart(bytes(4096 + 16), width, memoryview(bytearray(4096 + 16)))
    with pytest.raises(ValueError, match="planes"):
        planes.put_together(bytes(4096), 8, memoryview(bytearray(4088)))


def test_unknown_encodings_are_refused() -> None:
    """A number that stands for nothing is Damaged, and says what might help."""
    for encoding in (2, 3 << 8 | ZSTD, 16 << 8 | ZSTD, 8 << 8, 0xFFFFFFFF):
        with pytest.raises(Damaged, match="unknown encoding"):
            decoded(encoding, b"x", 4096)


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    """A frame that declares more, or nothing, is refused on its word; nothing is allocated."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(Damaged, match="declares"):
        decoded(ZSTD, bomb, 4096)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    with pytest.raises(Damaged, match="declares"):
        decoded(ZSTD, silent, 4096)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_frames_never_crash(data: st.DataObject) -> None:
    """A flipped, cut or extended frame gives Damaged or some content, never anything else."""
    content = content_of(data.draw(st.sampled_from(["counters", "cents", "text"])), 8192)
    encoding, stored = Encoder().encode(content)
    mutated = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    mutated = mutated[: data.draw(st.integers(0, len(mutated)))] + data.draw(st.binary(max_size=8))
    with contextlib.suppress(Damaged):
        decoded(data.draw(st.sampled_from([encoding, *codec.ENCODINGS])), bytes(mutated), 8192)


def test_trials_are_not_made_at_each_of_many_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a page, each unlike the one before: what they are is tried now and then."""
    tried = []
    real = Encoder._try_all
    monkeypatch.setattr(
        Encoder, "_try_all", lambda self, content: (tried.append(1), real(self, content))[1]
    )
    encoder = Encoder()
    kinds = [content_of(kind, 4096) for kind in ("text", "categories", "cents", "noise")]
    for number in range(256):
        content = kinds[number % 4]
        encoding, stored = encoder.encode(content)
        assert decoded(encoding, stored, 4096) == content
    assert 1 <= len(tried) <= 256 * 4096 // (64 << 10)
