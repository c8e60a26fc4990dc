"""ptrace(2): seize threads, read and write their registers, signals and masks.

Every call must be made by the operating system thread that seized the tracee. Sources: ptrace(2),
include/uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

from . import libc

PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GETREGSET: Final = 0x4204
PTRACE_SETREGSET: Final = 0x4205
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_LISTEN: Final = 0x4208
PTRACE_PEEKSIGINFO: Final = 0x4209
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_SECCOMP_GET_FILTER: Final = 0x420C
PTRACE_SECCOMP_GET_METADATA: Final = 0x420D
PTRACE_GET_RSEQ_CONFIGURATION: Final = 0x420F

PTRACE_O_TRACESYSGOOD: Final = 1 << 0
PTRACE_O_TRACEFORK: Final = 1 << 1
PTRACE_O_TRACECLONE: Final = 1 << 3
PTRACE_O_TRACEEXEC: Final = 1 << 4
PTRACE_O_EXITKILL: Final = 1 << 20
PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21

PTRACE_EVENT_FORK: Final = 1
PTRACE_EVENT_CLONE: Final = 3
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_STOP: Final = 128

PTRACE_PEEKSIGINFO_SHARED: Final = 1

NT_PRSTATUS: Final = 1
NT_X86_XSTATE: Final = 0x202

_CALL_STOP = 5 | 0x80  # SIGTRAP, marked

WALL: Final = 0x40000000  # __WALL: wait for children of every kind, wait(2)

SIGINFO_BYTES: Final = 128
XSTATE_LIMIT_BYTES: Final = 65536  # AMX makes it 11008; the kernel returns the true size

_ptrace = libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _call(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result: int = _ptrace(request, tid, address, data)
    if result == -1 and (error := ctypes.get_errno()):
        raise OSError(error, os.strerror(error))
    return result


def seize(tid: int, options: int = 0) -> None:
    """Attach to thread `tid` without stopping it."""
    _call(PTRACE_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; the stop is then waited for."""
    _call(PTRACE_INTERRUPT, tid)


def resume(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go on, delivering `signal` unless it is 0."""
    _call(PTRACE_CONT, tid, 0, signal)


def resume_to_call(tid: int, signal: int = 0) -> None:
    """As `resume`, until the thread enters or leaves a system call; see `is_at_call`."""
    _call(PTRACE_SYSCALL, tid, 0, signal)


def is_at_call(status: int) -> bool:
    """Whether waitpid's status is of such a stop; with PTRACE_O_TRACESYSGOOD."""
    return os.WIFSTOPPED(status) and os.WSTOPSIG(status) == _CALL_STOP


_LOOKS: Final = 80 if len(os.sched_getaffinity(0)) > 1 else 1


def wait_briefly(tid: int) -> int:
    """The status of a tracee by waitpid(2); 0 if none comes soon.

    It takes a thread some 30 µs to do what is asked of it on another processor; to sleep until then
    and be woken takes twice that. With one processor it is ours that the thread needs.
    """
    for _ in range(_LOOKS):
        waited, status = os.waitpid(tid, WALL | os.WNOHANG)
        if waited:
            return status
    return 0


def wait(tid: int) -> int:
    """The status of a tracee by waitpid(2), however long it takes."""
    return wait_briefly(tid) or os.waitpid(tid, WALL)[1]


def single_step(tid: int) -> None:
    """Let a stopped thread execute one instruction."""
    _call(PTRACE_SINGLESTEP, tid)


def listen(tid: int) -> None:
    """Leave a thread that is in a group-stop stopped, yet traced."""
    _call(PTRACE_LISTEN, tid)


def detach(tid: int, signal: int = 0) -> None:
    """Stop tracing a stopped thread; it runs on."""
    _suspended.discard(tid)
    _call(PTRACE_DETACH, tid, 0, signal)


def set_options(tid: int, options: int) -> None:
    """Set the PTRACE_O_… flags of a stopped thread; suspended filters stay so."""
    if tid in _suspended:
        options |= PTRACE_O_SUSPEND_SECCOMP
    _call(PTRACE_SETOPTIONS, tid, 0, options)


_suspended: set[int] = set()


def suspend_filters(tid: int, options: int = 0) -> None:
    """Suspend the seccomp(2) filters of a stopped thread until it is detached from.

    Its flags become `options` and that. Needs CAP_SYS_ADMIN, and no filter of our own.
    """
    _call(PTRACE_SETOPTIONS, tid, 0, options | PTRACE_O_SUSPEND_SECCOMP)
    _suspended.add(tid)


_SOCK_FILTER = struct.Struct("<HBBI")  # an instruction of classic BPF, linux/filter.h
_BPF_RETURN = 0x06
_RETURN_ACTION = 0xFFFF0000
_RETURN_USER_NOTIFICATION = 0x7FC00000
_FILTERS_AT_MOST = 256


def filter_programs(tid: int) -> list[tuple[bytes, int]]:
    """The seccomp filters of a stopped thread, first installed first: (program, flags to give).

    Needs what `suspend_filters` does. Sources: ptrace(2), linux/seccomp.h.
    """
    found: list[tuple[bytes, int]] = []
    for index in range(_FILTERS_AT_MOST):
        try:
            count = _call(PTRACE_SECCOMP_GET_FILTER, tid, index, 0)
        except OSError as error:
            if error.errno == errno.ENOENT:
                break
            raise
        buffer = ctypes.create_string_buffer(count * _SOCK_FILTER.size)
        _call(PTRACE_SECCOMP_GET_FILTER, tid, index, ctypes.addressof(buffer))
        flags = ctypes.create_string_buffer(struct.pack("<QQ", index, 0), 16)
        _call(PTRACE_SECCOMP_GET_METADATA, tid, 16, ctypes.addressof(flags))
        found.append((buffer.raw, struct.unpack("<QQ", flags.raw)[1]))
    return found


def asks_a_supervisor(program: bytes) -> bool:
    """Whether a filter hands some calls to another process (SECCOMP_RET_USER_NOTIF)."""
    return any(
        code == _BPF_RETURN and value & _RETURN_ACTION == _RETURN_USER_NOTIFICATION
        for code, _, _, value in _SOCK_FILTER.iter_unpack(program)
    )


def event_message(tid: int) -> int:
    """The message of the last event: the new thread's id after a clone, in our pid namespace."""
    message = ctypes.c_ulong()
    _call(PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(message))
    return message.value


def read_register_set(tid: int, kind: int) -> bytes:
    """A register set (NT_PRSTATUS: 27 u64; NT_X86_XSTATE: size of this machine's XSAVE area)."""
    room = _register_bytes.get(kind, XSTATE_LIMIT_BYTES)
    buffer = ctypes.create_string_buffer(room)
    vector = _Iovec(ctypes.addressof(buffer), room)
    _call(PTRACE_GETREGSET, tid, kind, ctypes.addressof(vector))
    if room == XSTATE_LIMIT_BYTES:
        _register_bytes[kind] = vector.length
    return buffer.raw[: vector.length]


_register_bytes = {NT_PRSTATUS: 27 * 8}  # of this machine's sets; what is not known yet is learnt


def write_register_set(tid: int, kind: int, content: bytes) -> None:
    """Set a register set; XSTATE must have exactly this machine's size (EINVAL otherwise)."""
    buffer = ctypes.create_string_buffer(content, len(content))
    vector = _Iovec(ctypes.addressof(buffer), len(content))
    _call(PTRACE_SETREGSET, tid, kind, ctypes.addressof(vector))


def read_signal_mask(tid: int) -> int:
    """The blocked signals, bit n-1 for signal n; the mask to come back to in ppoll and the like."""
    mask = ctypes.c_uint64()
    _call(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def write_signal_mask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    value = ctypes.c_uint64(mask)
    _call(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(value))


def pending_signals(tid: int, *, shared: bool) -> list[bytes]:
    """The queued siginfo_t (128 bytes each) of the thread, or of the process when `shared`."""
    found: list[bytes] = []
    batch = 16
    buffer = ctypes.create_string_buffer(batch * SIGINFO_BYTES)
    while True:
        # struct ptrace_peeksiginfo_args {u64 off; u32 flags; s32 nr;}
        request = ctypes.create_string_buffer(
            struct.pack("<QIi", len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, batch), 16
        )
        count = _call(PTRACE_PEEKSIGINFO, tid, ctypes.addressof(request), ctypes.addressof(buffer))
        found += [buffer.raw[i * SIGINFO_BYTES : (i + 1) * SIGINFO_BYTES] for i in range(count)]
        if count < batch:
            return found


def rseq_configuration(tid: int) -> tuple[int, int, int] | None:
    """(address, size in bytes, signature) of the thread's registered rseq area, None without."""
    buffer = ctypes.create_string_buffer(24)
    try:
        _call(PTRACE_GET_RSEQ_CONFIGURATION, tid, 24, ctypes.addressof(buffer))
    except OSError:
        return None  # kernels before 5.13, or built without rseq
    address, size, signature, _flags = struct.unpack_from("<QIII", buffer)
    return (address, size, signature) if address else None
