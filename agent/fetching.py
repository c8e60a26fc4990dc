"""An image of another node's store into ours: its manifest names the packs, those we lack come.

What comes is authenticated (both stores have one secret) before it gets its name, packs before the
manifest, so that whoever is killed has at most a few packs that no image needs. Unless it is to be
used at once: then the manifest comes first, and what packs are left for later are read where they
are meanwhile (`elsewhere`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote

from ..checkpoint.errors import Busy, Damaged, StoreUnavailable
from ..checkpoint.image import MOST_MANIFEST_BYTES, Image
from ..checkpoint.packs import pack_file, read_index
from ..checkpoint.store import Store
from .peers import Peer

_PIECE_BYTES = 1 << 20
_SILENT_S = 30.0

Progress = Callable[[str, int, int], None]


class Fetched(NamedTuple):
    """How many bytes have come, and how many were left for later."""

    length_bytes: int
    left_bytes: int


def fetch_image(
    store: Store,
    name: str,
    peer: Peer,
    progress: Progress,
    *,
    most_bytes: int | None = None,
    bytes_per_s: float = 0.0,
) -> Fetched:
    """Have image `name` in `store` as `peer` has it.

    If more than `most_bytes` would have to come, only the manifest does, and its packs are left for
    a later call. `bytes_per_s`: no faster than that, if not 0.

    Raises Damaged (it is not authentic here: another secret, or it was altered on its way), Busy
    (another image has that name), StoreUnavailable.
    """
    lock = store.open_lock()
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)  # packs without an image are not collected meanwhile
        manifest = _read_all(peer, f"/v1/images/{quote(name, safe='@')}")
        fetched = len(manifest)
        folder = os.dup(store.packs)
        try:
            image = Image(manifest, store.keys, folder, name=name)
        except BaseException:
            os.close(folder)
            raise
        with image:
            missing = [pack for pack in image.packs if not _has(store, pack[0])]
            left = sum(length for _, length in missing)
            if most_bytes is not None and left > most_bytes:
                _place_manifest(store, name, manifest)
                return Fetched(fetched, left)
            total = fetched + left
            for pack, length_bytes in missing:
                _fetch_pack(store, peer, pack, length_bytes, bytes_per_s)
                fetched += length_bytes
                progress("fetching", fetched, total)
        os.fsync(store.packs)
        _place_manifest(store, name, manifest)
        return Fetched(fetched, 0)
    except OSError as error:
        raise StoreUnavailable(f"cannot fetch image {name}: {error}") from error
    finally:
        os.close(lock)


def _read_all(peer: Peer, path: str) -> bytes:
    with contextlib.closing(peer.open(path, _SILENT_S)) as answer:
        found = answer.read(MOST_MANIFEST_BYTES + 1)
    if len(found) > MOST_MANIFEST_BYTES:
        raise Damaged(f"{peer.where} sent a manifest that is too long")
    return found


def _has(store: Store, pack: bytes) -> bool:
    try:
        os.stat(pack_file(pack), dir_fd=store.packs)
    except FileNotFoundError:
        return False
    return True


def _fetch_pack(
    store: Store, peer: Peer, pack: bytes, length_bytes: int, bytes_per_s: float
) -> None:
    draft = f"{pack_file(pack)}.{os.urandom(6).hex()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o600, dir_fd=store.temporary)
    try:
        with contextlib.closing(peer.open(f"/v1/packs/{pack.hex()}", _SILENT_S)) as answer:
            at_once = min(_PIECE_BYTES, int(bytes_per_s / 8) or 1) if bytes_per_s else _PIECE_BYTES
            while piece := answer.read(at_once):
                _write(descriptor, piece)
                if bytes_per_s:  # who sends waits when nobody reads
                    time.sleep(len(piece) / bytes_per_s)
        if os.fstat(descriptor).st_size != length_bytes:
            raise Damaged(f"{peer.where} sent another length of pack {pack.hex()}")
        read_index(descriptor, pack, store.keys)
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, pack_file(pack), src_dir_fd=store.temporary, dst_dir_fd=store.packs)
    finally:
        os.close(descriptor)
        os.unlink(draft, dir_fd=store.temporary)


def _place_manifest(store: Store, name: str, manifest: bytes) -> None:
    draft = f"{name[:80]}.{os.urandom(6).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o600, dir_fd=store.temporary)
    try:
        _write(descriptor, manifest)
        os.fsync(descriptor)
        os.link(draft, f"{name}.image", src_dir_fd=store.temporary, dst_dir_fd=store.manifests)
        os.fsync(store.manifests)
    except FileExistsError:
        there = os.open(f"{name}.image", os.O_RDONLY | os.O_CLOEXEC, dir_fd=store.manifests)
        with open(there, "rb") as file:
            if file.read() != manifest:
                raise Busy(f"another image is called {name} in {store.path}") from None
    finally:
        os.close(descriptor)
        os.unlink(draft, dir_fd=store.temporary)


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
