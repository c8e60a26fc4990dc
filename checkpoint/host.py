"""What an image needs of the machine it is restored on, and the comparison with this machine."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from blake3 import blake3

from . import machine, proc
from .errors import Incompatible
from .linux import PAGE_BYTES
from .vdso import pack, read_vdso


def describe_host(pid: int, vmas: list[proc.Vma], xstate: bytes) -> dict[str, Any]:
    """This machine as the stopped process `pid` knows it: kernel, clocks, vDSO, CPU features."""
    offsets, own = proc.clock_offsets(pid), proc.clock_offsets(os.getpid())
    ahead = {clock: offsets[clock] - own[clock] for clock in offsets}
    return {
        "architecture": machine.ARCHITECTURE,
        "page_bytes": PAGE_BYTES,
        "kernel": platform.release(),
        "node": platform.node(),
        "boot_id": proc.boot_id(),
        "monotonic_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC) + ahead["monotonic"],
        "boottime_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ahead["boottime"],
        "clock_offsets": offsets,
        "cpu_features": proc.cpu_features(),
        "xstate_bytes": len(xstate),
        "xstate_features": machine.enabled_features(xstate),
        "vdso": vdso_digest(pid, vmas),
        "vdso_code": pack(read_vdso(pid, vmas)),
    }


def vdso_digest(pid: int, vmas: list[proc.Vma]) -> str:
    """A digest of the vDSO's code, and of the layout of the kernel's data pages before it.

    Only the ELF file proper counts: lzy's own code may stand in the zeros behind it for a moment.
    """
    if content := read_vdso(pid, vmas):
        start = next(vma.start for vma in vmas if vma.kind == "vdso")
        layout = [(v.start - start, v.length) for v in vmas if v.kind == "vvar"]
        return blake3(content + repr(layout).encode()).hexdigest()
    return ""


def check_host(host: dict[str, Any], name: str) -> None:
    """Raise Incompatible, naming what this machine lacks, if it cannot carry the image."""
    if host["architecture"] != platform.machine():
        raise Incompatible(
            f"image {name} is of a {host['architecture']} process; this is {platform.machine()}",
            remedy=f"restore it on a {host['architecture']} machine",
        )
    missing = sorted(set(host["cpu_features"]) & _USER_FEATURES - set(proc.cpu_features()))
    if missing:
        raise Incompatible(
            f"image {name} was taken on a CPU with {', '.join(missing)}, which this CPU lacks",
            remedy=f"restore it on a machine like {host['node']}",
            missing=missing,
        )
    own = proc.kernel_mappings(os.getpid())
    if host["vdso"] != vdso_digest(os.getpid(), own) and not host.get("vdso_code"):
        raise Incompatible(
            f"image {name} was taken under kernel {host['kernel']}, whose vDSO differs from that "
            f"of {platform.release()}, and does not have that vDSO",
            remedy=f"restore it under kernel {host['kernel']}",
        )


# CPU features that change what user code may execute, by the names of /proc/cpuinfo. Features only
# the kernel uses (virtualisation, mitigations, power) are no reason to refuse.
_USER_FEATURES: frozenset[str] = frozenset(
    word
    for line in (
        "mmx sse sse2 pni ssse3 sse4_1 sse4_2 sse4a avx avx2 fma f16c bmi1 bmi2 adx aes vaes",
        "pclmulqdq vpclmulqdq sha_ni sha512 sm3 sm4 rdrand rdseed movbe popcnt abm lzcnt xsave",
        "xsaveopt xsavec cx16 fsgsbase erms fsrm clflushopt clwb rdpid rdtscp serialize movdiri",
        "movdir64b waitpkg avx_vnni avx_ifma avx_ne_convert avx512f avx512dq avx512ifma avx512cd",
        "avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq",
        "avx512_fp16 avx512_bf16 avx512_vp2intersect avx10 amx_tile amx_int8 amx_bf16 amx_fp16",
        "gfni rtm hle pku ospke 3dnowprefetch user_shstk xop fma4 tbm lwp",
    )
    for word in line.split()
)
