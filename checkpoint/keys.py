"""A store's secret, and the keys derived from it: one for each kind of thing that is authenticated.

One secret serves three purposes, and a tag made for one must never pass for another: a process
could hold in its memory the very bytes of a forged manifest, and the id of that chunk would then
be the tag the forgery needs. Each purpose therefore has its own derived key (BLAKE3's key
derivation mode, https://github.com/BLAKE3-team/BLAKE3-specs, section 5.3).
"""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3

SECRET_BYTES = 32
DIGEST_BYTES = 32


class StoreKeys(NamedTuple):
    """The keys of one store, 32 bytes each, and a value that tells whether the secret is right."""

    chunk: bytes
    pack: bytes
    manifest: bytes
    check: bytes


def derive_keys(secret: bytes) -> StoreKeys:
    """Derive the keys of a store from its 32 byte secret."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a store's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    purposes = ("chunk ids", "packs", "manifests", "key check")
    return StoreKeys(
        *(
            blake3(secret, derive_key_context=f"lzy 2026-11-22 store v1 {purpose}").digest()
            for purpose in purposes
        )
    )


def keyed_digest(key: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    """Keyed BLAKE3 (32 bytes) of the concatenated `parts`. The GIL is let go meanwhile."""
    if len(parts) == 1:
        return blake3(parts[0], key=key).digest()
    digest = blake3(key=key)
    for part in parts:
        digest.update(part)
    return digest.digest()


def same_digest(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Whether two digests are equal.

    In plain sight: whoever could measure how long it took can read the genuine digest besides.
    """
    return one == other
