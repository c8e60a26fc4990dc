"""How the content of one chunk becomes stored bytes and comes back.

An *encoding* (a number in the chunk's record) says how: raw, zstd, or zstd over byte planes of 8,
4 or 2 byte numbers (see `planes`). Neighbouring chunks are alike, so an encoder tries all of them
on a sample now and then, keeps to what was best, and tries again as soon as the gain changes.
What would not shrink by an eighth is stored raw: a fault on such a chunk is read straight into
place, and memory that does not compress costs next to nothing.

Smallest is not always best. Floats rounded to cents shrink to 0.37 as they lie, at 0.27 GB/s a
core, and to 0.56 in planes at 0.6 GB/s, and come back twice as fast; the fifth saved would have to
be written at less than 100 MB/s to be worth the wait. So planes also win with a little less gain
where the content clearly consists of numbers, which shows in how much their own width gains over
another. (The processor's clock was tried as a judge: too noisy on so small a sample.)
"""

from __future__ import annotations

import zstandard

from . import planes
from .errors import Damaged

RAW = 0
ZSTD = 1
ZSTD_PLANES_8 = 8 << 8 | ZSTD
ZSTD_PLANES_4 = 4 << 8 | ZSTD
ZSTD_PLANES_2 = 2 << 8 | ZSTD
ENCODINGS = (RAW, ZSTD, ZSTD_PLANES_8, ZSTD_PLANES_4, ZSTD_PLANES_2)

SUITE_NONE = 0
"""The only encryption suite there is as yet: stored bytes are authenticated, not encrypted."""

MOST_CHUNK_BYTES = 64 * 4096
_MOST_SHARE = 0.875
_SAMPLE_BYTES = 32768
_GLANCE_BYTES = 4096
_BYTES_PER_TRIAL = 8 << 20
_LEAST_BYTES_PER_TRIAL = 512 << 10
_LARGE_BYTES = 128 << 10
_BYTES_PER_GLANCE = 256 << 10
_NEWS = 0.08
_WORTH_THE_TIME = 0.25
_CLEARLY = 0.97
_CLEARLY_NUMBERS = 0.9

Buffer = bytes | bytearray | memoryview


def _compressor(hash_log: int) -> zstandard.ZstdCompressor:
    # Close to level 1. A minimum match of 7 leaves the short, dear matches of small numbers to
    # the entropy coder: twice as fast on categories, and smaller. The hash tables (32 and 4 KiB)
    # stay in the first-level cache; a plane needs no large one.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=18,
        hash_log=hash_log,
        chain_log=hash_log,
        search_log=1,
        min_match=7,
        target_length=0,
        write_checksum=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class Encoder:
    """Chooses an encoding chunk by chunk; one per thread, chunks best in order of address."""

    def __init__(self) -> None:
        self._large = _compressor(13)
        self._small = _compressor(10)
        self._plain = self._large
        self._scratch = memoryview(bytearray(_SAMPLE_BYTES))
        candidates = (ZSTD, *(width << 8 | ZSTD for width in planes.WIDTHS))
        self._candidates = candidates if planes.fast() else (ZSTD,)
        self._choice = RAW
        self._expected = 1.0
        self._until_trial_bytes = 0
        self._since_trial_bytes = 0
        self._until_glance_bytes = 0
        self._glance_apart = False

    def encode(self, content: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        """Answer (encoding, stored bytes) of one chunk; raw content is answered as it is."""
        length_bytes = len(content)
        self._until_trial_bytes -= length_bytes
        self._since_trial_bytes += length_bytes
        if self._until_trial_bytes < 0 or (self._choice == RAW and self._shrinks(content)):
            self._try_all(content)
        if self._choice == RAW:
            return RAW, content
        packed = self._compress(self._choice, content)
        share = len(packed) / length_bytes
        if abs(share - self._expected) > _NEWS:  # try again, but not at each of many small chunks
            soonest = max(0, _LEAST_BYTES_PER_TRIAL - self._since_trial_bytes)
            if length_bytes >= _LARGE_BYTES:
                soonest = 0
            self._until_trial_bytes = min(self._until_trial_bytes, soonest)
        self._expected = share
        if share > _MOST_SHARE:
            return RAW, content
        return self._choice, packed

    def _compress(self, encoding: int, content: bytes | memoryview) -> bytes:
        width = encoding >> 8
        if not width:
            return self._plain.compress(content)
        length_bytes = len(content)
        apart = self._room(length_bytes)
        planes.take_apart(content, width, apart)
        # A block per plane: each gets statistics of its own, noise is left raw and constants
        # become a byte. Smaller by a tenth and twice as fast to decode as planes run together.
        frame = self._small.compressobj(size=length_bytes)
        plane = length_bytes // width
        parts = []
        for start in range(0, length_bytes, plane):
            parts.append(frame.compress(apart[start : start + plane]))
            parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        parts.append(frame.flush())
        return b"".join(parts)

    def _room(self, length_bytes: int) -> memoryview:
        if length_bytes > len(self._scratch):
            self._scratch = memoryview(bytearray(MOST_CHUNK_BYTES))
        return self._scratch[:length_bytes]

    def _shrinks(self, content: bytes | memoryview) -> bool:
        """A glance at a chunk after one that did not compress: would this one?

        As it lies and in planes by turns, and of small chunks not at each: what is missed now is
        seen a little later.
        """
        self._until_glance_bytes -= len(content)
        if self._until_glance_bytes > 0:
            return False
        self._until_glance_bytes = _BYTES_PER_GLANCE
        middle = len(content) // 2 & -_GLANCE_BYTES
        glance = content[middle : middle + _GLANCE_BYTES]
        self._glance_apart = not self._glance_apart and len(self._candidates) > 1
        if self._glance_apart:
            apart = self._room(len(glance))
            planes.take_apart(glance, 8, apart)
            glance = apart
        return len(self._small.compress(glance)) < _MOST_SHARE * len(glance)

    def _try_all(self, content: bytes | memoryview) -> None:
        middle = max(0, len(content) - _SAMPLE_BYTES) // 2 & -_GLANCE_BYTES
        sample = content[middle : middle + _SAMPLE_BYTES]
        large, small = (
            len(table.compress(sample)) / len(sample) for table in (self._large, self._small)
        )
        # On categories a large table finds only matches by chance, and takes twice the time.
        self._plain = self._small if _CLEARLY * small <= large else self._large
        plain = min(large, small)
        shares = {
            encoding: len(self._compress(encoding, sample)) / len(sample)
            for encoding in self._candidates[1:]
        }
        choice, expected = ZSTD, plain
        if shares:
            # On a tie the narrower numbers: fewer blocks.
            best = min(shares, key=lambda encoding: (round(shares[encoding], 2), encoding))
            share = shares[best]
            numbers = share < _CLEARLY_NUMBERS * shares[ZSTD_PLANES_2]
            if share < _CLEARLY * plain or (numbers and share < plain + _WORTH_THE_TIME):
                choice, expected = best, share
        if expected > _MOST_SHARE:
            choice, expected = RAW, 1.0
        self._choice, self._expected = choice, expected
        self._until_trial_bytes = _BYTES_PER_TRIAL
        self._since_trial_bytes = 0


class PlainEncoder:
    """Tries nothing: for some dozen small chunks that would take most of the time."""

    def __init__(self) -> None:
        self._compressor = _compressor(10)

    def encode(self, content: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        """As `Encoder.encode`."""
        packed = self._compressor.compress(content)
        return (RAW, content) if len(packed) > _MOST_SHARE * len(content) else (ZSTD, packed)


class Decoder:
    """Turns stored bytes into content again; one per thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(self, encoding: int, stored: bytes | memoryview, into: memoryview) -> None:
        """Fill `into` with the content of a chunk; Damaged when the stored bytes do not give it.

        The length that a frame declares is looked at before anything is allocated.
        """
        if encoding == RAW:
            if len(stored) != len(into):
                raise Damaged(f"a raw chunk has {len(stored)} bytes instead of {len(into)}")
            into[:] = stored
            return
        width = encoding >> 8
        if encoding not in ENCODINGS or (width and not planes.splittable(len(into), width)):
            raise Damaged(
                f"a chunk of {len(into)} bytes has the unknown encoding {encoding:#x}",
                remedy="use a newer version of lzy",
            )
        content = self.decompress(stored, len(into))
        if width:
            planes.put_together(content, width, into)
        else:
            into[:] = content

    def decompress(self, frame: bytes | memoryview, length_bytes: int) -> bytes:
        """Decompress one zstd frame that must hold exactly `length_bytes`; else Damaged."""
        try:
            declared = zstandard.get_frame_parameters(frame).content_size
            if declared != length_bytes:
                raise Damaged(f"a frame declares {declared} bytes instead of {length_bytes}")
            return self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"a frame cannot be decompressed: {error}") from error
