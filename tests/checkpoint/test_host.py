"""What an image asks of a machine: each difference is refused, and by its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint import proc
from lzy.checkpoint.errors import Incompatible
from lzy.checkpoint.host import check_host, describe_host, vdso_digest
from lzy.checkpoint.linux import ptrace
from lzy.checkpoint.tracee import stopped


def describe(pid: int) -> dict[str, Any]:
    with stopped(pid) as tracee:
        tracee.prepare()
        xstate = ptrace.read_register_set(pid, ptrace.NT_X86_XSTATE)
        return describe_host(pid, proc.mappings(pid), xstate)


def test_digest_is_the_same_for_all_processes_and_while_our_code_is_there() -> None:
    """Every process has the same vDSO at another place; our code behind it does not count."""
    own = vdso_digest(os.getpid(), proc.mappings(os.getpid()))
    assert len(own) == 64
    for _ in range(2):
        with living("say('ready'); hear()") as subject:
            vmas = proc.mappings(subject.pid)
            assert vdso_digest(subject.pid, vmas) == own
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                (vdso,) = [v for v in vmas if v.kind == "vdso"]
                assert vdso.start < tracee.code < vdso.end
                assert vdso_digest(subject.pid, vmas) == own


def test_digest_sees_code_and_layout() -> None:
    """One changed byte of the vDSO, or data pages elsewhere before it, make another digest."""
    with living("say('ready'); hear()") as subject:
        vmas = proc.mappings(subject.pid)
        before = vdso_digest(subject.pid, vmas)
        moved = [
            v._replace(start=v.start - 4096, end=v.end - 4096) if v.kind == "vvar" else v
            for v in vmas
        ]
        assert vdso_digest(subject.pid, moved) != before
        (vdso,) = [v for v in vmas if v.kind == "vdso"]
        with open(f"/proc/{subject.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(vdso.start + 0x200)
            memory.write(b"\xcc")
        assert vdso_digest(subject.pid, vmas) != before
    assert vdso_digest(os.getpid(), []) == ""


def test_this_machine_carries_its_own_images() -> None:
    """What was described here is accepted here."""
    with living("say('ready'); hear()") as subject:
        host = describe(subject.pid)
    check_host(host, "image")
    assert host["page_bytes"] == 4096
    assert host["xstate_bytes"] >= 576
    assert host["xstate_features"] & 3 == 3
    assert "sse2" in host["cpu_features"]


def test_each_difference_is_named() -> None:
    """Architecture, CPU features, kernel (its vDSO), page size: the message says which."""
    with living("say('ready'); hear()") as subject:
        host = describe(subject.pid)
    # What only the kernel uses is no reason to refuse.
    check_host({**host, "cpu_features": [*host["cpu_features"], "vmx", "ibrs", "smep"]}, "image")
    absent = {"xop", "fma4", "avx512_vp2intersect", "sse4a"} - set(proc.cpu_features())
    lacking = sorted(absent)[:1]
    assert lacking
    for change, words in (
        ({"architecture": "aarch64"}, ["aarch64"]),
        ({"cpu_features": [*host["cpu_features"], *lacking]}, lacking),
        (
            {"vdso": "0" * 64, "vdso_code": "", "kernel": "5.4.0-elsewhere"},
            ["5.4.0-elsewhere", "vDSO"],
        ),
    ):
        with pytest.raises(Incompatible) as caught:
            check_host({**host, **change}, "my-image")
        for word in [*words, "my-image"]:
            assert word in caught.value.message
        assert caught.value.remedy
