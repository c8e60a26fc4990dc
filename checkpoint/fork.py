"""A second life beside the first: an image restored while its process may still be running.

The copy lives in a PID namespace of its own, where it has the pids it knows, and begins a session
of its own. Nothing is done to the original: what only one of two can have (an address, a socket's
name, a lock) is refused, and what both then share is told. *Apart*, it has a network of its own as
well, with nobody in it: no address is taken there, and whom it was connected to is out of reach.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from . import proc
from .copies import init_of
from .errors import AccessDenied, Busy, LzyError, NotFound, Unsupported
from .history import check_free, check_session_name, free_session_name, split_name
from .home import home, run_directory
from .joining import has_named, own_folder
from .linux import sockets
from .linux.network import enter_apart
from .restore import Progress, RestoreReport, restore
from .unprivileged import SAID, enter_if_needed

if TYPE_CHECKING:
    from .image import Image
    from .store import Store

_NAMED_AT_MOST = 3
_RANDOM = (
    "all lives of this image go on with the same random numbers (random, numpy, OpenSSL, keys made "
    "from them): --reseed gives this one others"
)
_APART = "its network is its own and empty: nobody outside reaches it, and it reaches nobody"


def fork(
    store: Store,
    image: Image,
    *,
    name: str | None = None,
    eager: bool = False,
    stdin: str | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    accept_changed_files: bool = False,
    apart: bool = False,
    reseed: bool = False,
    progress: Progress | None = None,
) -> tuple[str, RestoreReport]:
    """Make the process of `image` once more; (the name of its session, the restore's report).

    Its session is called `name`, else after the one it comes from. `apart`: with a network and an
    IPC namespace of its own, which the calling thread enters, too; and with a /dev/shm of its own,
    which it has in any case if it has memory there. `reseed`: its interpreter draws
    other random numbers; the process runs by then, and is ended if it cannot be asked to. Raises
    Busy when the name is taken, or something that the original holds, or when the interpreter
    computes; what `restore` and `reseed.reseed` raise besides.
    """
    with _names_chosen_alone():
        if name is None:
            name = free_session_name(store, split_name(image.name)[0])
        check_free(store, check_session_name(name))
        if taken := next(_taken_socket_files(image.document), None):
            raise Busy(
                f"{image.name} cannot have a second life now: another process, probably the "
                f"original, serves its socket {taken}",
                remedy="let the original close that socket, or dump and end it first",
                path=taken,
            )
        without_root = enter_if_needed(image.document, image.name, "new")
        if apart:
            _enter_apart()
        has_own = apart or has_named(image.document)
        try:
            with own_folder((store.path, home())) if has_own else nullcontext():
                report = restore(
                    image,
                    eager=eager or without_root,
                    pid_namespace="new",
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    accept_changed_files=accept_changed_files,
                    session=name,
                    progress=progress,
                )
        except Busy as error:
            if "path" in error.facts:  # a lock
                raise Busy(
                    f"{image.name} cannot have a second life now: {error.message}",
                    remedy="let the original unlock that file, or dump and end it first",
                    **error.facts,
                ) from error
            if "address" not in error.facts:
                raise
            raise Busy(
                f"{image.name} cannot have a second life in the same network: the address "
                f"{_spelled(error.facts['address'])} is taken, probably by the original",
                remedy="give the copy a network of its own (lzy fork --network new), or dump and "
                "end the original first",
                address=error.facts["address"],
            ) from error
    notes = [*report.notes, *shared_things(image.document, stdin, stdout, stderr)]
    if without_root:
        notes.append(SAID)
    if apart:
        notes.append(_APART)
    return name, report._replace(notes=[*notes, *(_reseed(report) if reseed else [_RANDOM])])


def _enter_apart() -> None:
    try:
        enter_apart()
    except OSError as error:
        raise AccessDenied(
            f"cannot make a network of its own for the copy: {error.strerror}",
            remedy="run lzy as root (CAP_SYS_ADMIN); see also user.max_net_namespaces",
        ) from error


def _reseed(report: RestoreReport) -> list[str]:
    """Notes on what was seeded anew. Where that cannot be done, the copy is ended, and it raised.

    Of its descendants those without Python are passed over.
    """
    from .reseed import in_words, reseed

    said = []
    try:
        for pid in _with_descendants(report.pid):
            try:
                words = in_words(reseed(pid))
            except (Unsupported, NotFound):
                if pid == report.pid:
                    raise
                continue
            said += words if pid == report.pid else [f"pid {pid}: {line}" for line in words]
    except BaseException as error:
        with suppress(ProcessLookupError, NotFound):
            os.kill(init_of(report.pid) or report.pid, signal.SIGKILL)
        if not isinstance(error, LzyError):
            raise
        raise type(error)(
            f"the copy was not seeded anew, and ended: {error.message}",
            remedy="restore it without --reseed, or take a checkpoint while it waits",
            **error.facts,
        ) from error
    return said


def _with_descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with suppress(NotFound):
            found += proc.children(parent)
    return found


def shared_things(document: dict[str, Any], *replaced: str | None) -> list[str]:
    """What a copy would share with a living original, a sentence each.

    `replaced`: files in place of standard input, output and error, None where it stays.
    """
    table = document["descriptors"]
    elsewhere = {str(number) for number, path in enumerate(replaced) if path is not None}
    held = {
        place["description"]
        for number, place in table["descriptors"].items()
        if number not in elsewhere
    }
    entries = [entry for index, entry in enumerate(table["descriptions"]) if index in held]
    written = [
        entry["path"]
        for entry in entries
        if entry.get("form") == "regular" and entry["flags"] & os.O_ACCMODE != os.O_RDONLY
    ]
    pipes = [entry["path"] for entry in entries if entry["kind"] == "pipe" and entry.get("path")]
    mapped = [
        vma["path"]
        for vma in document["vmas"]
        if vma["kind"] == "file" and vma["permissions"][1] == "w" and vma["permissions"][3] == "s"
    ]
    said = []
    if written:
        said.append(f"both may write {_listed(written)}, each from its own position")
    if mapped:
        said.append(f"both share the memory that maps {_listed(mapped)}")
    if pipes:
        said.append(f"both are at the named pipe {_listed(pipes)}: who reads first gets it")
    return said


def _taken_socket_files(document: dict[str, Any]) -> Iterator[str]:
    """Names in the file system that sockets of the image had and a living socket has now.

    Looked up, not tried: a connection that came and went would be seen by whoever listens there.
    """
    wanted: dict[str, str] = {}
    for entry in document["descriptors"]["descriptions"]:
        name = entry.get("name")
        if entry["kind"] == "unix_socket" and isinstance(name, str) and entry.get("file"):
            wanted[name] = os.path.join(entry["folder"], name)
    if not wanted:
        return
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split(None, 7)  # proc_net_unix(5): the inode is the 7th, the path the 8th
            if len(words) < 8 or (path := wanted.get(words[7].rstrip("\n"))) is None:
                continue
            try:
                found = os.stat(path).st_ino
                if sockets.unix_state(int(words[6])).file_inode == found & 0xFFFFFFFF:
                    yield path
            except OSError:
                continue  # it has gone meanwhile


@contextmanager
def _names_chosen_alone() -> Iterator[None]:
    """Two forks at once do not choose the same name: the second waits until the first has it.

    A lock of this process's own (fcntl(2)): the pager that is started meanwhile has no part in it.
    """
    folder = run_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(folder / "forks.lock", flags, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _spelled(address: Any) -> str:
    """`127.0.0.1:8888`."""
    if isinstance(address, bytes):
        return address.decode(errors="replace").replace("\0", "@")
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listed(paths: list[str]) -> str:
    names = list(dict.fromkeys(paths))
    rest = len(names) - _NAMED_AT_MOST
    shown = ", ".join(names[:_NAMED_AT_MOST])
    return f"{shown} and {rest} more" if rest > 0 else shown
