"""A store: a folder of images, the packs they share, and the secret that authenticates them.

    config.json    format, version, identity, encryption suite, check of the secret
    secret         32 random bytes, mode 0600
    lock           writers hold it shared, the garbage collection exclusively (flock(2))
    images/NAME.image
    packs/ID.pack
    tmp/           what is being written; garbage when its writer is dead

No global lock stops a reader, and a writer that dies leaves garbage, never damage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .codec import SUITE_NONE
from .errors import Busy, Damaged, LzyError, NotFound
from .image import (
    HEADER_BYTES,
    MEMBER_MARK,
    MOST_MANIFEST_BYTES,
    MOST_NAME_BYTES,
    Header,
    Image,
    parse_header,
)
from .keys import SECRET_BYTES, StoreKeys, derive_keys
from .unavailable import unavailable

if TYPE_CHECKING:
    from collections.abc import Collection

    from .garbage import GarbageReport
    from .known import KnownChunks
    from .pending import Progress
    from .verify import VerifyReport
    from .writer import ImageWriter

STORE_VERSION = 1
_FORMAT = "lzy store"
_NAME = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9._@-]*")
_SUFFIX = ".image"
_MOST_CONFIG_BYTES = 4096


class ImageSummary(NamedTuple):
    """What a list of images tells of one; sizes in bytes.

    `raw_bytes`: memory given, zero pages included; `stored_bytes`: what this image added to the
    store; `reused_bytes`: stored bytes it shares with older images. `damage` is empty unless the
    header of the manifest cannot be trusted; all numbers are 0 then.
    """

    name: str
    created_unix_s: float
    raw_bytes: int
    zero_bytes: int
    stored_bytes: int
    reused_bytes: int
    manifest_bytes: int
    window_pages: int
    run_count: int
    chunk_count: int
    pack_count: int
    damage: str = ""

    @classmethod
    def of(cls, header: Header) -> ImageSummary:
        """The summary of an authenticated header."""
        return cls(
            name=header.name,
            created_unix_s=header.created_unix_ns / 1e9,
            raw_bytes=header.raw_bytes,
            zero_bytes=header.zero_bytes,
            stored_bytes=header.stored_bytes,
            reused_bytes=header.reused_bytes,
            manifest_bytes=header.manifest_bytes,
            window_pages=header.window_pages,
            run_count=header.run_count,
            chunk_count=header.chunk_count,
            pack_count=header.pack_count,
        )


def check_name(name: str) -> str:
    """Answer `name` if an image may be called so, else raise LzyError."""
    if len(name) > MOST_NAME_BYTES or not _NAME.fullmatch(name):
        raise LzyError(
            f"an image cannot be called {name[:200]!r}",
            remedy=f"use up to {MOST_NAME_BYTES} of A-Z a-z 0-9 . _ @ -, "
            "starting with neither dot nor dash",
        )
    return name


class Store:
    """An open store. `packs`, `manifests` and `temporary` are descriptors of its directories."""

    def __init__(self, path: Path, keys: StoreKeys, identity: bytes) -> None:
        self.path = path
        self.keys = keys
        self.identity = identity
        self.packs = self.manifests = self.temporary = -1
        self._writers: dict[ImageWriter, int] = {}
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            self.packs = os.open(path / "packs", flags)
            self.manifests = os.open(path / "images", flags)
            self.temporary = os.open(path / "tmp", flags)
        except OSError as error:
            self.close()
            raise unavailable(f"open store {path}", error) from error

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Store:
        """Open the store in folder `path`; `create` makes one where there is none (mode 0700).

        Raises NotFound (no store there), AccessDenied, Damaged (its configuration or secret),
        StoreUnavailable.
        """
        path = Path(os.path.abspath(path))
        try:
            if create and not (path / "config.json").exists():
                _create(path)
            with open(path / "config.json", "rb") as file:
                text = file.read(_MOST_CONFIG_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(
                f"there is no store at {path}",
                remedy="lzy attach and lzy dump make one; --store and LZY_HOME name another",
                path=str(path),
            ) from error
        except OSError as error:
            raise unavailable(f"open store {path}", error) from error
        identity, check = _parse_config(path, text)
        try:
            with open(path / "secret", "rb") as file:
                secret = file.read(SECRET_BYTES + 1)
        except FileNotFoundError as error:
            raise Damaged(f"the secret of store {path} is missing") from error
        except OSError as error:
            raise unavailable(f"read the secret of store {path}", error) from error
        if len(secret) != SECRET_BYTES:
            raise Damaged(f"the secret of store {path} has a wrong length")
        keys = derive_keys(secret)
        if keys.check != check:
            raise Damaged(f"the secret of store {path} is not the one it was made with")
        return cls(path, keys, identity)

    def close(self) -> None:
        """Let go of the directories."""
        for descriptor in (self.packs, self.manifests, self.temporary):
            if descriptor >= 0:
                os.close(descriptor)
        self.packs = self.manifests = self.temporary = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- images

    def names(self) -> list[str]:
        """Names of all images, in no order."""
        try:
            files = os.listdir(self.manifests)
        except OSError as error:
            raise unavailable(f"list the images of {self.path}", error) from error
        names = [file.removesuffix(_SUFFIX) for file in files if file.endswith(_SUFFIX)]
        return [name for name in names if _NAME.fullmatch(name)]

    def images(self) -> list[ImageSummary]:
        """All images, newest first; their headers are authenticated, damaged ones are marked.

        Of a session the larger number is the newer one, whatever the clock was set to meanwhile.
        """
        found = []
        for name in self.names():
            try:
                found.append(ImageSummary.of(self._header(name)))
            except NotFound:
                continue  # removed meanwhile
            except Damaged as error:
                found.append(ImageSummary(name, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, str(error)))
        return _newest_first(found)

    def load(self, name: str | None = None, *, known: Collection[bytes] = ()) -> Image:
        """Load and authenticate an image, the latest when no name is given.

        Each pack it names is checked to be there whole (see `Image.check_packs`). As long as the
        image is open (also in forked children that inherited it) it cannot be removed. `NAME#PID`
        is a process of the tree by itself (`Image.member`). Raises NotFound, Damaged,
        StoreUnavailable.
        """
        if name is None:
            name = self._latest()
        name, _, member = name.partition(MEMBER_MARK)
        image = self.load_unchecked(name)
        try:
            image.check_packs(known)
            return image.member(int(member)) if member else image
        except BaseException:
            image.close()
            raise

    def load_unchecked(self, name: str) -> Image:
        """Like `load`, without looking at the packs."""
        descriptor = self._open_manifest(check_name(name))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if not status.st_nlink:
                raise NotFound(f"image {name} was just removed from {self.path}", image=name)
            if status.st_size > MOST_MANIFEST_BYTES:
                raise Damaged(f"the manifest of image {name} has {status.st_size} bytes")
            manifest = os.pread(descriptor, status.st_size, 0)
            while 0 < len(manifest) < status.st_size and (
                more := os.pread(descriptor, status.st_size, len(manifest))
            ):  # one read(2) moves 2 GiB at most
                manifest += more
            packs = os.dup(self.packs)
            try:
                return Image(manifest, self.keys, packs, name=name, lock=descriptor)
            except BaseException:
                os.close(packs)
                raise
        except OSError as error:
            os.close(descriptor)
            raise unavailable(f"read image {name}", error) from error
        except BaseException:
            os.close(descriptor)
            raise

    def remove(self, name: str) -> None:
        """Remove an image, damaged or not; what only it needed goes with the next collection.

        Raises NotFound, Busy while it is in use: a pager serves from it, or a process waits for
        one to, its own having died.
        """
        from .waiting import who_waits  # most who open a store remove nothing
        from .working_set import remove_order

        descriptor = self._open_manifest(check_name(name))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if waiting := who_waits(self.path, name):
                raise Busy(
                    f"process {waiting[0]} still waits for memory from image {name}",
                    remedy=f"run: lzy pager --resume {waiting[0]}",
                    pid=waiting[0],
                )
            os.unlink(name + _SUFFIX, dir_fd=self.manifests)
            os.fsync(self.manifests)
            remove_order(self.path, name)
        except BlockingIOError as error:
            raise Busy(
                f"image {name} is in use", remedy="wait until the pager that serves it has ended"
            ) from error
        except OSError as error:
            raise unavailable(f"remove image {name}", error) from error
        finally:
            os.close(descriptor)

    # -- writing

    def writer(self, name: str, *, window_pages: int = 64, workers: int = 2) -> ImageWriter:
        """Begin image `name`. Raises Busy when the name is taken or being written."""
        from .writer import ImageWriter

        check_name(name)
        lock = self.open_lock()
        reservation = -1
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            reservation = self._reserve(name)
            if self._exists(name):
                raise Busy(f"there is an image {name} already", remedy="choose another --name")
            writer = ImageWriter(
                self, name, window_pages=window_pages, workers=workers, reservation=reservation
            )
        except OSError as error:
            _close(lock, reservation)
            raise unavailable(f"begin image {name}", error) from error
        except BaseException:
            _close(lock, reservation)
            raise
        self._writers[writer] = lock
        return writer

    def release_writer(self, writer: ImageWriter) -> None:
        """Called by a writer that is done: its share of the store's lock goes."""
        if (lock := self._writers.pop(writer, -1)) >= 0:
            os.close(lock)

    def known_chunks(self) -> KnownChunks:
        """What the store has now, to deduplicate against."""
        from .known import KnownChunks

        return KnownChunks(self.packs, self.keys)

    def open_lock(self) -> int:
        """A new descriptor of the lock file, not locked yet."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            return os.open(self.path / "lock", flags, 0o600)
        except OSError as error:
            raise unavailable(f"lock store {self.path}", error) from error

    # -- upkeep

    def collect_garbage(self) -> GarbageReport:
        """Remove what no image needs. Raises Busy while one is being written, Damaged."""
        from .garbage import collect_garbage

        return collect_garbage(self)

    def verify(
        self, name: str, progress: Progress | None = None, *, known: str = ""
    ) -> VerifyReport:
        """Read and authenticate every byte of an image. Raises Damaged at the first wrong one.

        But for what it has in common with the image `known`, if that is there.
        """
        from .verify import Place, list_places, verify_image

        places: frozenset[Place] = frozenset()
        if known:
            with contextlib.suppress(LzyError), self.load_unchecked(known) as other:
                places = list_places(other)
        with self.load(name) as image:
            return verify_image(image, progress, known=places)

    # -- inside

    def _open_manifest(self, name: str) -> int:
        try:
            return os.open(
                name + _SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.manifests
            )
        except FileNotFoundError as error:
            raise NotFound(
                f"there is no image {name} in {self.path}", remedy="see lzy images", image=name
            ) from error
        except OSError as error:
            raise unavailable(f"open image {name}", error) from error

    def _reserve(self, name: str) -> int:
        """A locked descriptor of `tmp/NAME.image`: one writer per name, until it ends or dies."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            descriptor = os.open(name + _SUFFIX, flags, 0o600, dir_fd=self.temporary)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise Busy(
                    f"image {name} is being written by another dump", remedy="choose another --name"
                ) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # another writer of that name ended in between: once more

    def _header(self, name: str) -> Header:
        descriptor = self._open_manifest(name)
        try:
            return parse_header(os.pread(descriptor, HEADER_BYTES, 0), self.keys, name=name)
        except OSError as error:
            raise unavailable(f"read image {name}", error) from error
        finally:
            os.close(descriptor)

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name + _SUFFIX, dir_fd=self.manifests, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _latest(self) -> str:
        for image in self.images():
            if not image.damage:
                return image.name
        raise NotFound(f"there is no image in {self.path}", remedy="make one with lzy dump")


def _newest_first(images: list[ImageSummary]) -> list[ImageSummary]:
    """By when they were made; but none is older than one of its session with a smaller number."""
    from .history import split_name  # which knows of us

    ages: dict[str, tuple[float, int, str]] = {}
    latest_s: dict[str, float] = {}
    for session, number, image in sorted((*split_name(image.name), image) for image in images):
        latest_s[session] = max(latest_s.get(session, 0.0), image.created_unix_s)
        ages[image.name] = (latest_s[session], number, image.name)
    return sorted(images, key=lambda image: ages[image.name], reverse=True)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _parse_config(path: Path, text: bytes) -> tuple[bytes, bytes]:
    """(identity, check of the secret) from config.json; Damaged if it is none or not known."""
    try:
        config = json.loads(text) if len(text) <= _MOST_CONFIG_BYTES else None
        if not isinstance(config, dict) or config["format"] != _FORMAT:
            raise Damaged(f"{path}/config.json is not that of a store")
        if (config["version"], config["encryption"]) != (STORE_VERSION, SUITE_NONE):
            raise Damaged(
                f"store {path} has version {config['version']!r} and encryption suite"
                f" {config['encryption']!r}, which are not known",
                remedy="use a newer version of lzy",
            )
        identity, check = bytes.fromhex(config["identity"]), bytes.fromhex(config["check"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}/config.json is damaged: {error!r}") from error
    if len(identity) != 16 or len(check) != 32:
        raise Damaged(f"{path}/config.json is damaged: a field has a wrong length")
    return identity, check


def _create(path: Path) -> None:
    """Make a store; two that do so at once end up with the same one.

    The secret comes first and the configuration last, each linked into place whole, so that a
    folder with a configuration is a whole store, and one without is not looked at.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = {"secret", "config.json", "lock", "images", "packs", "tmp", "hints"}
    strangers = [name for name in os.listdir(path) if name not in own]
    if strangers:
        raise NotFound(
            f"{path} is no store and holds other things ({sorted(strangers)[0]})",
            remedy="name an empty folder",
        )
    for folder in ("images", "packs", "tmp"):
        (path / folder).mkdir(mode=0o700, exist_ok=True)
    secret = _place(path / "secret", os.urandom(SECRET_BYTES))
    if len(secret) != SECRET_BYTES:
        raise Damaged(f"the secret of store {path} has a wrong length")
    config = {
        "format": _FORMAT,
        "version": STORE_VERSION,
        "encryption": SUITE_NONE,
        "identity": os.urandom(16).hex(),
        "check": derive_keys(secret).check.hex(),
    }
    _place(path / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def _place(path: Path, content: bytes) -> bytes:
    """Make file `path` with `content` unless it is there; answer what is there now."""
    temporary = path.parent / "tmp" / f"{path.name}.{os.urandom(8).hex()}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path.read_bytes()
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return content
    finally:
        os.close(descriptor)
        os.unlink(temporary)
