"""An image into a running process, or a tree of them, step by step.

The first process is made with its old pid as a stub of a few bytes, traced by us; the others are
forked from it, each by its own parent (see `member`). Each makes itself into what it was by system
calls that we inject as lists: mappings, threads, signals, timers, rights. Memory is written in
before it runs (eager), or left out and served by a pager as it is touched (lazy).

*Guarantee*: nothing of them runs before everything is in place. Until the last step (`commit`) the
death of the restorer kills the unfinished processes; the image stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from . import birth, machine, proc, resources
from .errors import Busy, Damaged, LzyError, NotFound, Unsupported
from .family import begin_guard, settle_family
from .history import remember_restored
from .home import home
from .host import check_host
from .image import MEMBER_MARK, Image
from .interrupts import Deferred
from .linux import process, ptrace
from .member import Member
from .member_memory import HOLE_BYTES, Brought, Filling, is_readonly
from .needed import Needs
from .stages import reach
from .vdso import bridge

if TYPE_CHECKING:
    from .ipc import Ipc
    from .joining import NamedMemory
    from .segments import Segments

Progress = Callable[[str, int, int], None]

_DELETED = " (deleted)"


class RestoreReport(NamedTuple):
    """What a restore did: times in seconds, `pid` as seen from here."""

    image: str
    pid: int
    pid_in_namespace: int
    processes: int
    lazy: bool
    namespace: str
    first_instruction_s: float
    total_s: float
    pager_pid: int | None
    notes: list[str]


def restore(
    image: Image,
    *,
    eager: bool = False,
    pid_namespace: str = "auto",
    stdin: str | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    accept_changed_files: bool = False,
    session: str | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Make the process of `image` again and let it run, detached.

    Its next checkpoint continues the session that `image` is of, or begins `session`.

    `pid_namespace` is host (its old pid here), new (a namespace of its own) or auto. A mapped or
    open file that changed is refused unless `accept_changed_files`. Raises
    Incompatible, Busy (pid taken), Damaged, KernelError; no process is left behind then.
    """
    options = resources.RestoreOptions(
        stdin=stdin, stdout=stdout, stderr=stderr, accept_changed_files=accept_changed_files
    )
    notes: list[str] = []
    if not process.may_choose_pids():
        from . import unprivileged

        unprivileged.enter_if_needed(image.document, image.name, pid_namespace)
        eager, pid_namespace, notes = True, "new", [unprivileged.SAID]
    report = Restorer(image, eager, session, progress).restore(pid_namespace, options)
    report.notes[:0] = notes
    return report


class Restorer:
    """One restore; its methods are its steps, in order."""

    def __init__(
        self,
        image: Image,
        eager: bool,
        session: str | None,
        progress: Progress | None,
        *,
        on_demand: bool = False,
    ) -> None:
        """`on_demand`: the first process gets only what it touches, until it is roused."""
        self.began = time.monotonic()
        self.image = image
        self.eager = eager
        self.session = session
        self.progress = progress
        self.document: dict[str, Any] = image.document
        self.brought = Brought()
        self.notes = self.brought.notes
        self.root = Member(image, self.brought, eager=eager)
        self.root.on_demand = on_demand
        self.members = [self.root]
        self.objects: list[int] = []
        self.segments: Segments | None = None
        self.names: NamedMemory | None = None
        self.apart = contextlib.ExitStack()
        self.ipc: Ipc | None = None
        self.files: dict[tuple[str, bool], int] = {}
        self.local: dict[int, int] = {}
        self._find_family(eager)
        self.table = self.root.table

    def _find_family(self, eager: bool) -> None:
        """The other processes of the tree, parents before their children."""
        if not self.document.get("members"):
            return
        others = {}
        for described in self.document["members"]:
            member = Member(self.image.member(described["pid"]), self.brought, eager=eager)
            parent = {m.number: m for m in self.members}.get(member.own["parent"])
            if parent is None:
                raise Damaged(f"image {self.image.name} has a process without its parent")
            member.parent = parent
            parent.children.append(member)
            self.members.append(member)
            others[str(member.number)] = member.table["descriptors"]
        self.root.table = {**self.root.table, "others": others}

    # -- the way ---------------------------------------------------------------------------------

    def restore(self, pid_namespace: str, options: resources.RestoreOptions) -> RestoreReport:
        """All steps; see the module."""
        collects = gc.isenabled()
        gc.disable()  # of a tree the document alone is half a million of objects to be looked at
        try:
            return self._restore(pid_namespace, options)
        finally:
            if collects:
                gc.enable()

    def _restore(self, pid_namespace: str, options: resources.RestoreOptions) -> RestoreReport:
        try:
            return self._make(pid_namespace, options)
        except Busy as error:
            number = error.facts.get("taken")  # it was free a moment ago
            if not number or pid_namespace != "auto":
                raise
            self.image.forget_document()
            again = Restorer(
                self.image,
                self.eager,
                self.session,
                self.progress,
                on_demand=self.root.on_demand,
            )
            again.notes.append(_lives_apart(number))
            return again._make("new", options)

    def _make(self, pid_namespace: str, options: resources.RestoreOptions) -> RestoreReport:
        born: birth.Birth | None = None
        root = self.root
        try:
            # 1. Refuse what cannot succeed before anything is made.
            if MEMBER_MARK in self.image.name:
                raise Unsupported(
                    f"{self.image.name} is one process of several, which live together only",
                    remedy=f"restore {self.image.name.partition(MEMBER_MARK)[0]}",
                )
            if self.document.get("format") != 1:
                raise Damaged(f"image {self.image.name} has an unknown document format")
            check_host(self.document["host"], self.image.name)
            if bridge(self.document):
                self.notes.append("its vDSO is another kernel's; its functions lead to this one's")
            self._look_at_huge_pages()
            pid_namespace = self._look_at_names(pid_namespace, options.accept_changed_files)
            wanted = self._wanted()
            new_namespace = self._choose_namespace(pid_namespace, wanted)
            options = self._open_files(options)
            # 2. Contents of unnamed files, then the descriptors, all in this process.
            self._make_objects()
            self._make_segments()
            self._find_ipc()
            self.local = resources.make_descriptors(self.table, _Source(self.objects), options)
            reach("restore.checked")
            # 3. A process with the old pid, stopped in our stub.
            born = self._give_birth(wanted, new_namespace)
            root.be_born(born.pid)
            # 4. Its memory, and its children with theirs.
            small = root.grow(self.progress)
            with contextlib.closing(Filling()) as filling:
                for member in small:
                    member.begin_filling(filling)
                filling.finish()
            for member in self.members:
                member.protect()
            if len(self.members) > 1 or self.document.get("zombies"):
                settle_family(self.members, self.document.get("zombies", ()))
            if self.segments:
                self.segments.detach()
            if self.ipc:
                self.ipc.make(root.tracee)
            # 5. All the rest.
            for member in self.members:
                member.reinstate()
            reach("restore.registered")
            resources.finish_descriptors(
                self.table,
                self.local,
                pids={member.table["pid"]: member.pid for member in self.members},
                tids={
                    described["tid"]: new.tid
                    for member in self.members
                    for described, new in zip(member.threads, member.new_threads, strict=True)
                },
            )
            remember_restored(self.image, born.pid, self.session, self.notes)
            for member in self.members:
                member.leave()
            if self.names:
                self.names.settle()
            # 6. They run, whether their pagers are ready or not: a fault waits for its pager.
            reach("restore.paging")
            self._commit()
            first_instruction_s = time.monotonic() - self.began
            reach("restore.committed")
        except BaseException:
            if born:
                others = [member.pid for member in self.members[1:]]
                others += [t.pid for member in self.members for t in member.stand_ins.values()]
                _undo(born, others)
            for member in self.members:  # a pager leaves, now that its process is gone
                if member.pager:
                    with contextlib.suppress(LzyError):
                        member.pager.wait()
            for made in (self.segments, self.ipc):
                if made:
                    made.remove()
            if self.names:
                self.names.undo()
            raise
        finally:
            for member in self.members:
                member.close()
            if self.names:
                self.names.close()
            resources.close_descriptors(self.local)
            for descriptor in [*self.objects, *self.files.values()]:
                os.close(descriptor)
            self.apart.close()
        pagers = self._await_pagers()
        return RestoreReport(
            image=self.image.name,
            pid=born.pid,
            pid_in_namespace=wanted.pid,
            processes=len(self.members),
            lazy=any(member.pager for member in self.members),
            namespace="new" if new_namespace else "host",
            first_instruction_s=first_instruction_s,
            total_s=time.monotonic() - self.began,
            pager_pid=pagers[0] if pagers else None,
            notes=self.notes,
        )

    def _await_pagers(self) -> list[int]:
        """Until all are ready to serve; their pids, that of the first process first."""
        found = []
        for member in self.members:
            try:
                if member.pager and (pager := member.pager.wait()):
                    found.append(pager)
            except KeyboardInterrupt:
                self.notes.append("interrupted while its pager got ready; see lzy pager --status")
                return found
            except LzyError as error:
                raise LzyError(
                    f"process {member.pid} is restored, but {error.message}",
                    remedy=f"it waits for its memory; run: lzy pager --resume {member.pid}",
                    pid=member.pid,
                ) from error
        return found

    # -- 1. checks -------------------------------------------------------------------------------

    def _wanted(self) -> birth.Wanted:
        own = self.root.own
        numbers = [t["tid"] for member in self.members for t in member.threads]
        numbers += [ended["pid"] for ended in self.document.get("zombies", ())]
        return birth.Wanted(
            pid=self.root.number,
            parent=own["parent"],
            group=own["group"],
            session=own["session"],
            tids=frozenset(numbers),
        )

    def _choose_namespace(self, choice: str, wanted: birth.Wanted) -> bool:
        """Whether a new PID namespace is needed. Raises Busy if `host` is asked for and taken."""
        taken = birth.await_free_numbers(wanted)
        if choice == "new":
            return True
        if choice == "host" or not taken:
            if taken:
                raise birth.number_taken(taken[0])
            if os.getppid() == wanted.parent:
                return False
            if choice == "auto" and self._watches_parent():
                self.notes.append(
                    f"the process watches its parent (pid {wanted.parent}), which did not start "
                    "this restore: it lives in a new PID namespace with a stand-in for it"
                )
                return True
            if self._has_death_signal():
                # Its parent would be this command, whose end would bring the signal at once.
                self.notes.append("it is not signalled when its parent ends any more (PDEATHSIG)")
                for thread in self.root.threads:
                    thread["death_signal"] = 0
            return False
        self.notes.append(_lives_apart(taken[0]))
        return True

    def _has_death_signal(self) -> bool:
        return any(thread["death_signal"] for thread in self.root.threads)

    def _watches_parent(self) -> bool:
        """Whether the process ends, or acts, when its parent changes, as Jupyter kernels do."""
        if self._has_death_signal():
            return True
        layout = self.root.own["layout"]
        text = self.root.read_image(layout["env_start"], layout["env_end"] - layout["env_start"])
        return b"JPY_PARENT_PID=" in text

    def _look_at_huge_pages(self) -> None:
        """Raise Incompatible if there are not as many free as are needed."""
        members = [self.document, *self.document.get("members", ())]
        objects = self.document["objects"]
        if any("huge_page_bytes" in described for described in objects) or any(
            vma["kind"] == "huge" for member in members for vma in member["vmas"]
        ):
            from .setaside import refuse_too_few

            refuse_too_few(self.image.name, members, objects)

    def _look_at_names(self, pid_namespace: str, accept_changed: bool) -> str:
        """See what became of memory that has a name; which PID namespace is to be chosen then."""
        if all("path" not in described for described in self.document["objects"]):
            return pid_namespace
        from .joining import NamedMemory, own_folder

        self.names = NamedMemory(self.image, self.notes, accept_changed=accept_changed)
        if not self.names.look():
            return pid_namespace
        if pid_namespace == "host":
            raise Busy(
                f"another life of {self.image.name} has its shared memory in /dev/shm",
                remedy="end that, or restore with --copy",
            )
        self.apart.enter_context(own_folder((self.image.store_path, home())))
        self.notes.append(
            "another life of it has its shared memory: this one has a /dev/shm and a PID "
            "namespace of its own"
        )
        self.names.look()
        return "new"

    def _open_files(self, options: resources.RestoreOptions) -> resources.RestoreOptions:
        """Find every mapped file, the executable, the folder; see `needed`. The options then."""
        needs = Needs(self.image, accept_changed=options.accept_changed_files)
        for member in self.members:
            needs.open_files(member.own, member.vmas, self.files)
        options = options._replace(known_files=needs.known_files)
        needs.settle(partial(resources.find_lacking, self.table, _Source(self.objects), options))
        self.notes += needs.notes
        return options

    # -- 2. contents -----------------------------------------------------------------------------

    def _make_objects(self) -> None:
        """Make a memory file for each unnamed file, and fill it; open or make those with a name."""
        if self.document["objects"]:
            from .carried import write_content
        for described in self.document["objects"]:
            if self.names and "path" in described:
                self.objects.append(self.names.open(described))
                continue
            name = os.path.basename(described["name"].removesuffix(" (deleted)"))
            name = name.removeprefix("memfd:")[:200] or "lzy"
            huge = described.get("huge_page_bytes", 0)
            if huge:
                from .setaside import make_file

                descriptor = make_file(name, huge)
            else:
                descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.objects.append(descriptor)
            length_bytes = described["length_bytes"]
            write_content(
                self.image, described["space"], descriptor, length_bytes, mapped=bool(huge)
            )
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, *described["owner"])
            os.fchmod(descriptor, described["mode"])

    def _make_segments(self) -> None:
        """Make or find the System V shared memory that the processes have attached."""
        vmas = [vma for member in self.members for vma in member.vmas if vma["kind"] == "segment"]
        if vmas:
            from .segments import Segments

            self.segments = Segments()
            self.segments.make(vmas, self.objects)

    def _find_ipc(self) -> None:
        """Which System V semaphores and message queues are missing here."""
        if "system_v" in self.document:
            from .ipc import Ipc

            self.ipc = Ipc(self.document["system_v"])

    # -- 3. birth --------------------------------------------------------------------------------

    def _give_birth(self, wanted: birth.Wanted, new_namespace: bool) -> birth.Birth:
        """The first process, stopped in our stub, with all that it and the others need."""
        brought = self.brought
        brought.hole = self._find_hole()
        brought.floor = resources.free_number(self.table)
        # What the process must inherit besides its own descriptors goes above all their numbers.
        floor = max(brought.floor, *self.local.values(), 100) + 1
        made: list[int] = []

        def bring(descriptor: int) -> int:
            made.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD, floor))
            return made[-1]

        try:
            brought.files = {key: bring(descriptor) for key, descriptor in self.files.items()}
            brought.objects = [bring(descriptor) for descriptor in self.objects]
            executable = os.memfd_create("lzy-stub", os.MFD_CLOEXEC)
            stub = fcntl.fcntl(executable, fcntl.F_DUPFD_CLOEXEC, floor)
            made.append(stub)
            os.close(executable)
            os.write(stub, machine.tiny_executable(machine.CODE, brought.hole))
            # Memory that may not be written (a sealed memfd) can only be mapped from such a one.
            brought.readonly = {
                number: bring(descriptor) for number, descriptor in self._open_readonly().items()
            }
            brought.directories = {}
            for member in self.members[1:]:
                place = member.own["root"] + "\0" + member.own["cwd"]
                if place not in brought.directories:
                    directory = _open_directory(member.own["root"], member.own["cwd"])
                    brought.directories[place] = bring(directory)
                    os.close(directory)
            for member in self.members:
                member.plan(floor)
                made += member.harbour
            brought.local = self.local if len(self.members) > 1 else {}
            keep = [*made, *brought.local.values()]
            born = birth.give_birth(
                wanted,
                stub,
                new_namespace=new_namespace,
                offsets=self._clock_offsets(),
                become=lambda: self._become(keep),
            )
        finally:
            for descriptor in made:
                os.close(descriptor)
        reach("restore.created")
        return born

    def _become(self, keep: list[int]) -> None:
        """In the child that becomes the first process."""
        own = self.root.own
        if own["root"] != "/":
            os.chroot(own["root"])
        _enter_directory(own["cwd"])
        resources.place_descriptors(self.table, self.local, keep)
        for descriptor in self.brought.local.values():
            os.set_inheritable(descriptor, True)  # for the others, who are forked from the stub

    def _open_readonly(self) -> dict[int, int]:
        """For each object that is mapped without leave to write: a read-only descriptor of it."""
        opened: dict[int, int] = {}
        for vma in [vma for member in self.members for vma in member.vmas]:
            if is_readonly(vma) and vma["object"] not in opened:
                key = (f"object {vma['object']}", False)
                if key not in self.files:  # closed at the end
                    path = f"/proc/self/fd/{self.objects[vma['object'] - 1]}"
                    self.files[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                opened[vma["object"]] = self.files[key]
        return opened

    def _clock_offsets(self) -> dict[str, int] | None:
        """How far the process's clocks are ahead of the machine's, if otherwise than ours.

        They are when it comes from another boot or machine, or came from one when it was restored.
        """
        host = self.document["host"]
        own = proc.clock_offsets(os.getpid())
        if host["boot_id"] == proc.boot_id():
            wanted = host["clock_offsets"]
        else:
            now = (
                time.clock_gettime_ns(time.CLOCK_MONOTONIC),
                time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            )
            wanted = {
                "monotonic": host["monotonic_ns"] - now[0] + own["monotonic"],
                "boottime": host["boottime_ns"] - now[1] + own["boottime"],
            }
        return None if wanted == own else wanted

    def _find_hole(self) -> int:
        """Addresses that neither the image nor a fresh program uses, for our code."""
        address = 0x1000000000
        vmas = [vma for member in self.members for vma in member.vmas]
        for vma in sorted(vmas, key=lambda vma: vma["start"]):
            if vma["end"] <= address:
                continue
            if vma["start"] >= address + HOLE_BYTES:
                break
            address = (vma["end"] + 0xFFFFFFF) & ~0xFFFFFFF
        if address > 0x700000000000:
            raise LzyError(f"no free addresses between the mappings of image {self.image.name}")
        return address

    # -- 7. the end ------------------------------------------------------------------------------

    def _commit(self) -> None:
        """From here on the processes live by themselves.

        Their threads are all still stopped while they stop depending on us; should we die in
        between, they die before they ran, or all of them run.
        """
        for member in self.members:
            if member.own["stopped"]:
                os.kill(member.pid, signal.SIGSTOP)
        guard = begin_guard([member.pid for member in self.members])
        with Deferred():
            try:
                for member in self.members:
                    for thread in member.new_threads:
                        ptrace.set_options(thread.tid, 0)
                reach("restore.committing")
            except BaseException:
                guard.close()
                raise
            guard.dismiss()
            for member in self.members:
                for thread in member.new_threads:
                    ptrace.detach(thread.tid)
                member.tracee.threads.clear()
                member.tracee.close()
        guard.wait()


class _Source:
    """The unnamed files made again, for `resources`."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    def open(self, number: int) -> int:
        return os.dup(self._descriptors[number - 1])


def _open_directory(root: str, path: str) -> int:
    """A descriptor of a working directory below `root`; of a new and removed one if it is gone."""
    if not path.endswith(_DELETED):
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(os.path.join(root, path.lstrip("/")), flags)
    import tempfile

    made = tempfile.mkdtemp(prefix="lzy-")
    try:
        return os.open(made, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.rmdir(made)


def _enter_directory(path: str) -> None:
    """chdir(2); a directory that was removed under the process is one made and removed again."""
    if not path.endswith(_DELETED):
        os.chdir(path)
        return
    import tempfile

    made = tempfile.mkdtemp(prefix="lzy-")
    os.chdir(made)
    os.rmdir(made)


def _lives_apart(taken: int) -> str:
    return f"pid {taken} is taken here: the process lives in a new PID namespace"


def _undo(born: birth.Birth, others: list[int]) -> None:
    """End unfinished processes, and their namespace: its init ends when all others are gone."""
    for pid in filter(None, (born.pid, *others, born.init)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # A traced leader's end is reported only after that of its traced threads, ptrace(2).
        with contextlib.suppress(NotFound):
            for tid in sorted(proc.threads(pid), key=pid.__eq__):
                with contextlib.suppress(ChildProcessError):
                    while os.WIFSTOPPED(os.waitpid(tid, ptrace.WALL)[1]):
                        pass
