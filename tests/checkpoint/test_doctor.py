"""The doctor, on this machine and where things are taken from it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lzy.checkpoint import doctor, proc
from lzy.checkpoint.linux import libc, probes

PR_SET_DUMPABLE = 4


def _by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_the_machine_that_runs_the_tests_is_ready(tmp_path: Path) -> None:
    """Where the engine's tests pass, the doctor says that dump and restore work."""
    findings = doctor.examine(tmp_path / "store")
    assert doctor.is_ready(findings), [f for f in findings if f.verdict == "missing"]
    assert not (tmp_path / "store").exists(), "looking makes nothing"


def test_whatever_does_not_work_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """When every probe fails, each finding names the kernel's answer and what to do."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in vars(probes):
        if callable(getattr(probes, name)) and not name.startswith("_") and name.islower():
            if name in ("syscall", "contextmanager", "effective_capabilities", "Callable"):
                continue
            monkeypatch.setattr(probes, name, fail)
    findings = doctor.examine(Path("/proc/nowhere"))
    assert not doctor.is_ready(findings)
    broken = [finding for finding in findings if finding.verdict != "works"]
    assert len(broken) >= 12
    for finding in broken:
        assert finding.words
        assert finding.remedy or finding.name in ("gpu", "cgroups", "huge pages"), finding.name
    assert "ENOSYS" in _by_name(findings)["clone3 set_tid"].words


def test_a_user_without_capabilities_is_told_so(tmp_path: Path) -> None:
    """As nobody, capabilities are lacking, and pids can be chosen in namespaces of one's own."""
    if os.geteuid():
        pytest.fail("needs root to become somebody else")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            # Losing root makes /proc/self unreadable until the next exec; prctl(2).
            libc.prctl(PR_SET_DUMPABLE, 1)
            found = _by_name(doctor.examine(Path("/proc/nowhere")))
            names = ("capabilities", "clone3 set_tid", "store", "PAGEMAP_SCAN", "descriptors")
            os.write(writer, " ".join(found[name].verdict for name in names).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        verdicts = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert verdicts == "degraded degraded missing works works"


@pytest.mark.parametrize("number", [0, 1])
def test_probes_leave_nothing_behind(number: int) -> None:
    """However often the doctor looks, no descriptor and no child stays."""
    before = sorted(os.listdir("/proc/self/fd"))
    children = set(proc.children(os.getpid()))  # pytest adopts orphans of other tests
    doctor.examine(Path("/tmp"))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert set(proc.children(os.getpid())) <= children


def test_every_probe_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that runs in a child brings the kernel's answer back to us."""

    def refuse(flags: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(probes, "_unshare", refuse)
    with pytest.raises(PermissionError):
        probes.enter_pid_namespace()
    with pytest.raises(PermissionError):
        probes.shift_clocks()
