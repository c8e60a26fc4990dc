"""The doctor: tries everything that dump and restore rely on and says in words what it means.

To check one more thing, write a function that returns a `Finding` and put it into `_CHECKS`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .linux import probes

Verdict = Literal["works", "degraded", "missing"]

_GIB = 1 << 30
# Faults that a lazily restored process may cause are told by these events.
_PAGER_FEATURES = ["event_fork", "event_remap", "event_remove", "event_unmap"]
# What each capability is for; without them lzy works on one's own processes with limits.
_CAPABILITIES = {
    "sys_ptrace": "other users' processes, and telling the pager of forks",
    "checkpoint_restore": "pids chosen at restore, here",
    "sys_admin": "new pid and time namespaces, here",
    "sys_resource": "raising limits above their hard values",
}


@dataclass(frozen=True)
class Finding:
    """What one check found: `words` for people, `remedy` (may be empty), `details` for programs.

    A finding that is `needed` and missing means that dump or restore fails on this machine.
    """

    name: str
    verdict: Verdict
    words: str
    remedy: str = ""
    needed: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def examine(store: Path) -> list[Finding]:
    """Run every check, with `store` as the folder for images; takes some 50 ms."""
    return [check(store) for check in _CHECKS]


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether dump and restore would work here."""
    return not any(finding.needed and finding.verdict == "missing" for finding in findings)


def _check_kernel(_: Path) -> Finding:
    about = os.uname()
    details = {"release": about.release, "machine": about.machine, "system": about.sysname}
    words = f"{about.sysname} {about.release} on {about.machine}"
    if about.sysname == "Linux" and about.machine == "x86_64":
        return Finding("kernel", "works", words, needed=True, details=details)
    remedy = "lzy runs on Linux on x86-64; use such a machine"
    return Finding("kernel", "missing", words, remedy, needed=True, details=details)


def _check_python(_: Path) -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    words = f"lzy runs on Python {version}; what it dumps may be any program"
    return Finding("python", "works", words, needed=True, details={"version": version})


def _check_capabilities(_: Path) -> Finding:
    held = probes.effective_capabilities()
    lacking = [name for name in _CAPABILITIES if name not in held]
    details = {"effective": held, "lacking": lacking, "uid": os.geteuid()}
    if not lacking:
        return Finding("capabilities", "works", "all that lzy can use", details=details)
    purposes = {name: _CAPABILITIES[name] for name in lacking}
    details["for"] = purposes
    words = "without " + ", ".join(f"CAP_{name.upper()}" for name in lacking)
    if len(lacking) == 1:
        words += f" ({purposes[lacking[0]]})"
    remedy = "give the container " if os.geteuid() == 0 else "run as root, or in a container with "
    remedy += " ".join(f"--cap-add={name.upper()}" for name in lacking)
    return Finding("capabilities", "degraded", words, remedy, details=details)


def _check_tracing(_: Path) -> Finding:
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    details = {"yama_ptrace_scope": int(scope) if scope else None}
    told = f"kernel.yama.ptrace_scope is {scope}" if scope else "no Yama restriction"
    try:
        probes.seize_sibling()
    except OSError as error:
        words = f"a process that is not our child cannot be traced ({_answer(error)}); {told}"
        if scope in ("1", "2"):
            remedy = "run with CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 0"
        elif scope == "3":
            remedy = "kernel.yama.ptrace_scope 3 lasts until the next boot; boot with another"
        else:
            remedy = "a seccomp profile or container forbids ptrace; allow it (SYS_PTRACE)"
        return Finding("tracing", "missing", words, remedy, needed=True, details=details)
    words = f"processes can be seized and stopped; {told}"
    return Finding("tracing", "works", words, needed=True, details=details)


def _check_rseq(_: Path) -> Finding:
    return _try(
        "rseq",
        probes.read_rseq_configuration,
        works="restartable sequences can be read and made again",
        fails="restartable sequences cannot be read",
        verdict="degraded",
        remedy="a kernel from 5.13 on has PTRACE_GET_RSEQ_CONFIGURATION",
    )


def _check_descriptors(_: Path) -> Finding:
    def both() -> None:
        probes.duplicate_descriptor()
        probes.compare_descriptions()

    return _try(
        "descriptors",
        both,
        works="pidfd_getfd and kcmp tell what a process has open, and what it shares",
        fails="a process's descriptors cannot be taken or compared",
        remedy="needs Linux 5.6 with CONFIG_KCMP, and ptrace rights; check the seccomp profile",
        needed=True,
    )


def _check_userfaultfd(_: Path) -> Finding:
    setting = _read("/proc/sys/vm/unprivileged_userfaultfd")
    details: dict[str, Any] = {"unprivileged": setting, "features": []}
    try:
        offered, everywhere = probes.userfaultfd_features()
        lacking = [name for name in _PAGER_FEATURES if name not in offered]
        details |= {"features": offered, "lacking": lacking, "kernel_faults": everywhere}
        probes.serve_missing_page([name for name in _PAGER_FEATURES if name in offered])
    except OSError as error:
        words = f"memory cannot be loaded as it is touched ({_answer(error)})"
        remedy = "run as root, or with CAP_SYS_PTRACE; until then it is loaded at once"
        if error.errno == errno.ENOSYS:
            remedy = "needs CONFIG_USERFAULTFD in the kernel; until then `lzy restore --eager`"
        return Finding("userfaultfd", "degraded", words, remedy, details=details)
    if lacking:
        words = f"works, but does not tell of {', '.join(lacking)}"
        remedy = "use `lzy restore --eager` for programs that fork or unmap while they load"
        return Finding("userfaultfd", "degraded", words, remedy, details=details)
    if not everywhere:
        words = "serves only what a program touches itself, not what the kernel touches for it"
        remedy = "set vm.unprivileged_userfaultfd to 1, run as root, or use `lzy restore --eager`"
        return Finding("userfaultfd", "degraded", words, remedy, details=details)
    words = f"memory can be loaded as it is touched ({len(offered)} features)"
    return Finding("userfaultfd", "works", words, details=details)


def _check_pagemap_scan(_: Path) -> Finding:
    return _try(
        "PAGEMAP_SCAN",
        probes.scan_present_pages,
        works="finds the pages of a process that hold something",
        fails="missing; pagemap is read instead, which is slower",
        verdict="degraded",
        remedy="a kernel from 6.7 on has it",
    )


def _check_write_tracking(_: Path) -> Finding:
    return _try(
        "write tracking",
        probes.track_written_pages,
        works="write-protect async finds exactly the pages written since",
        fails="missing; each checkpoint has to hash all memory",
        verdict="degraded",
        remedy="a kernel from 6.7 on has UFFD_FEATURE_WP_ASYNC",
    )


def _check_chosen_pids(_: Path) -> Finding:
    finding = _try(
        "clone3 set_tid",
        probes.clone_with_pid,
        works="processes and threads come back with their pids",
        fails="pids cannot be chosen",
        remedy="needs Linux 5.5 and CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN), as root has; or "
        "leave to make user namespaces (user.max_user_namespaces)",
        needed=True,
    )
    if finding.verdict == "works" or not _works_among_own_users(probes.choose_pid_apart):
        return finding
    words = "in a user and a PID namespace of one's own pids are chosen, and memory comes at once"
    remedy = "run as root to have the same pids here, and memory as it is touched"
    return Finding("clone3 set_tid", "degraded", words, remedy, needed=True)


def _check_pid_namespace(_: Path) -> Finding:
    return _try(
        "pid namespace",
        _or_among_own_users(probes.enter_pid_namespace),
        works="a process whose pid is taken can come back in a namespace of its own",
        fails="a process whose pid is taken cannot come back",
        verdict="degraded",
        remedy="needs CAP_SYS_ADMIN and CONFIG_PID_NS; check the container's profile",
    )


def _check_time_namespace(_: Path) -> Finding:
    return _try(
        "time namespace",
        _or_among_own_users(probes.shift_clocks),
        works="CLOCK_MONOTONIC goes on from where it was, after a boot or elsewhere",
        fails="CLOCK_MONOTONIC jumps after a boot or on another machine",
        verdict="degraded",
        remedy="needs CAP_SYS_ADMIN and CONFIG_TIME_NS (Linux 5.6)",
    )


def _works_among_own_users(probe: Callable[[], None]) -> bool:
    try:
        probes.among_own_users(probe)
    except OSError:
        return False
    return True


def _or_among_own_users(probe: Callable[[], None]) -> Callable[[], None]:
    """The probe; where it is forbidden to us, in a user namespace of our own."""

    def run() -> None:
        try:
            probe()
        except PermissionError:
            probes.among_own_users(probe)

    return run


def _check_memory_map(_: Path) -> Finding:
    return _try(
        "process image",
        probes.read_memory_map_size,
        works="exe, arguments and environment come back as /proc shows them",
        fails="the kernel lacks CONFIG_CHECKPOINT_RESTORE",
        remedy="use a kernel built with CONFIG_CHECKPOINT_RESTORE, as distributions' are",
        needed=True,
    )


def _check_stub(_: Path) -> Finding:
    setting = _read("/proc/sys/vm/memfd_noexec")
    finding = _try(
        "stub",
        probes.make_executable_memfd,
        works="a process can be started from a file in memory",
        fails="files in memory may not be executed",
        remedy="set vm.memfd_noexec to 0 or 1",
        needed=True,
    )
    finding.details["vm_memfd_noexec"] = int(setting) if setting else None
    return finding


def _check_seccomp(_: Path) -> Finding:
    mode = _status_field("Seccomp") or "0"
    details = {"mode": int(mode)}
    if mode == "0":
        return Finding("seccomp", "works", "no filter on lzy's system calls", details=details)
    words = "a filter stands between lzy and the kernel; the checks here passed through it"
    return Finding("seccomp", "works", words, details=details)


def _check_cgroups(_: Path) -> Finding:
    lines = [line.split(":", 2) for line in (_read("/proc/self/cgroup") or "").splitlines()]
    unified = next((path for number, _, path in lines if number == "0"), None)
    old = {name: path for _, names, path in lines for name in names.split(",") if name}
    root = "/sys/fs/cgroup"
    freezers = [f"{root}{unified}/cgroup.freeze", f"{root}/unified{unified}/cgroup.freeze"]
    if "freezer" in old:
        freezers.append(f"{root}/freezer{old['freezer']}/tasks")
    version = 2 if unified is not None and not old else 1 if old else None
    writable = [path for path in freezers if os.access(path, os.W_OK)]
    details = {"version": version, "controllers": sorted(old), "freezer_writable": bool(writable)}
    kind = {2: "version 2", 1: "version 1", None: "none mounted"}[version]
    if version == 1 and unified is not None:
        kind = "versions 1 and 2 side by side"
    if version is None:
        words, remedy = "none mounted; lzy does not need them", ""
        return Finding("cgroups", "missing", words, remedy, details=details)
    freezer = "with a freezer" if "freezer" in old or version == 2 else "without a freezer"
    if not os.access(root, os.W_OK):
        freezer += ", not ours to write"
    return Finding("cgroups", "works", f"{kind}, {freezer}; lzy needs none", details=details)


def _check_gpu(_: Path) -> Finding:
    driver = _read("/proc/driver/nvidia/version")
    nodes = sorted(
        name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdecimal()
    )
    details: dict[str, Any] = {"driver": driver and driver.splitlines()[0], "devices": nodes}
    if not driver and not nodes:
        return Finding("gpu", "missing", "none on this machine; lzy needs none", details=details)
    names = _ask_nvidia_smi()
    details["names"] = names
    told = ", ".join(names) if names else ", ".join(nodes) or "driver without a device"
    words = f"{told}; a process that holds it cannot be dumped yet, and counts as in use:"
    words += " whether it computes is not asked"
    remedy = "end its use of the GPU first (a process that only sees it is no trouble)"
    return Finding("gpu", "degraded", words, remedy, details=details)


def _check_huge_pages(_: Path) -> Finding:
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = setting.partition("[")[2].partition("]")[0] or None
    details = {"transparent_huge_pages": chosen}
    if chosen in ("always", "madvise"):
        words = f"transparent huge pages: {chosen}"
        return Finding("huge pages", "works", words, details=details)
    words = f"transparent huge pages: {chosen or 'not in this kernel'}; memory is a bit slower"
    return Finding("huge pages", "degraded", words, details=details)


def _check_store(store: Path) -> Finding:
    there = store
    while not there.exists() and there != there.parent:
        there = there.parent
    details: dict[str, Any] = {"path": str(store), "exists": store.exists()}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        words = f"{there} cannot be written by this user"
        remedy = "name another folder with --store, or set LZY_HOME"
        return Finding("store", "missing", words, remedy, needed=True, details=details)
    figures = os.statvfs(there)
    free_bytes = figures.f_bavail * figures.f_frsize
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    details |= {"free_bytes": free_bytes, "memory_bytes": memory_bytes}
    words = f"{store} has {free_bytes / _GIB:.1f} GiB free"
    if free_bytes < memory_bytes / 2:
        words += f", the machine's memory is {memory_bytes / _GIB:.1f} GiB"
        remedy = "run `lzy gc`, remove images, or name another disk with --store"
        return Finding("store", "degraded", words, remedy, needed=True, details=details)
    return Finding("store", "works", words, needed=True, details=details)


_CHECKS: list[Callable[[Path], Finding]] = [
    _check_kernel,
    _check_python,
    _check_capabilities,
    _check_seccomp,
    _check_tracing,
    _check_descriptors,
    _check_rseq,
    _check_chosen_pids,
    _check_pid_namespace,
    _check_time_namespace,
    _check_memory_map,
    _check_stub,
    _check_userfaultfd,
    _check_pagemap_scan,
    _check_write_tracking,
    _check_huge_pages,
    _check_cgroups,
    _check_gpu,
    _check_store,
]


def _try(
    name: str,
    probe: Callable[[], object],
    *,
    works: str,
    fails: str,
    remedy: str,
    verdict: Verdict = "missing",
    needed: bool = False,
) -> Finding:
    """The finding of a probe that either passes or is answered with an error."""
    try:
        probe()
    except OSError as error:
        details = {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
        words = f"{fails} ({_answer(error)})"
        return Finding(name, verdict, words, remedy, needed=needed, details=details)
    return Finding(name, "works", works, needed=needed)


def _answer(error: OSError) -> str:
    """What the kernel said, shortly."""
    return errno.errorcode.get(error.errno or 0, "") or str(error)


def _read(path: str) -> str | None:
    """A small file of the kernel's without its last line end; None where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def _status_field(name: str) -> str | None:
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":")[1].strip()
    return None


def _ask_nvidia_smi() -> list[str]:
    """Names and memory of the GPUs as nvidia-smi tells them; empty when it does not."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
