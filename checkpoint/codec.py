"""How the content of one chunk becomes stored bytes and comes back.

An *encoding* (a number in the chunk's record) says how. The encoder tries a small sample first,
so that memory which does not compress costs next to nothing, and stores raw whatever would not
shrink by a tenth: a fault on a raw chunk is read straight into place.
"""

from __future__ import annotations

import zstandard

from .errors import Damaged

RAW = 0
ZSTD = 1

SUITE_NONE = 0
"""The only encryption suite there is as yet: stored bytes are authenticated, not encrypted."""

MOST_CHUNK_BYTES = 64 * 4096
_SAMPLE_BYTES = 4096
_GAIN = 0.9

Buffer = bytes | bytearray | memoryview


class Encoder:
    """Chooses an encoding chunk by chunk; one per thread."""

    def __init__(self, level: int = 1) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)

    def encode(self, content: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        """Answer (encoding, stored bytes) of one chunk; raw content is answered as it is."""
        length_bytes = len(content)
        if length_bytes > 4 * _SAMPLE_BYTES:
            middle = length_bytes // 2
            sample = content[middle : middle + _SAMPLE_BYTES]
            if len(self._compressor.compress(sample)) > _GAIN * _SAMPLE_BYTES:
                tail = content[-_SAMPLE_BYTES:]
                if len(self._compressor.compress(tail)) > _GAIN * _SAMPLE_BYTES:
                    return RAW, content
        packed = self._compressor.compress(content)
        if len(packed) > _GAIN * length_bytes:
            return RAW, content
        return ZSTD, packed


class Decoder:
    """Turns stored bytes into content again; one per thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(self, encoding: int, stored: bytes | memoryview, length_bytes: int) -> Buffer:
        """The `length_bytes` bytes of content of a chunk; Damaged when they cannot be had.

        The length declared by the frame is looked at before anything is allocated.
        """
        if encoding == RAW:
            if len(stored) != length_bytes:
                raise Damaged(f"a raw chunk has {len(stored)} bytes instead of {length_bytes}")
            return stored
        if encoding != ZSTD:
            raise Damaged(
                f"a chunk has the unknown encoding {encoding}", remedy="use a newer version of lzy"
            )
        try:
            declared = zstandard.get_frame_parameters(stored).content_size
            if declared != length_bytes:
                raise Damaged(f"a chunk declares {declared} bytes instead of {length_bytes}")
            return self._decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"a chunk cannot be decompressed: {error}") from error
