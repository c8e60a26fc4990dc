"""The one part that knows the machine: x86-64 code that runs inside a tracee, and its registers.

A table of system calls is data: records of eight u64 (number, six arguments, result) that a loop
of machine code executes one after the other, up to the first error. One continue runs them all.

The loop ends with a signal sent to the running thread itself. Where a tracer lives that is a stop
it waits for. Where it died, the signal is one the process ignores, and the code behind it puts
every register and the signal mask back from a *context block* and jumps to where the thread was:
`kill -9` of lzy in the midst of an injected call therefore leaves the process as it was.

The source of the code, from which `CODE` was assembled (GNU as, intel syntax):

    # rbp: context block — 0 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi,
    #      rdi (112), 120 rip, 128 rflags, 136 sigmask, 144 u32 tgid, 148 u32 tid, 152 signal
    run:    mov rax,[rbx]; test rax,rax; js notify       # rbx: records; a negative number ends
            mov rdi,[rbx+8]; mov rsi,[rbx+16]; mov rdx,[rbx+24]
            mov r10,[rbx+32]; mov r8,[rbx+40]; mov r9,[rbx+48]
            mov eax,eax; syscall; mov [rbx+56],rax
            cmp rax,-4095; jb 1f                         # -errno is -4095…-1
            test byte ptr [rbx+4],1; jz notify           # bit 32 of the number: errors are fine
    1:      add rbx,64; jmp run
    one:    syscall; mov r12,rax; jmp notify             # one call from registers
    split:  syscall; mov r12,rax; test rax,rax; jnz notify
            xor edi,edi; mov eax,60; syscall             # a clone's child without a tracer: exit
    notify: mov eax,234; mov edi,[rbp+144]; mov esi,[rbp+148]; mov edx,[rbp+152]; syscall
    resume: mov eax,14; mov edi,2; lea rsi,[rbp+136]; xor edx,edx; mov r10d,8; syscall
            lea rsp,[rsp-128]                            # stay clear of the red zone
            push [rbp+120]; push [rbp+128]
            mov r15,[rbp]; … ; mov rdi,[rbp+112]; mov rbp,[rbp+32]
            popfq; ret 128

Sources: System V ABI AMD64 (red zone), Intel SDM vol. 2, syscall(2), signal(7).
"""

from __future__ import annotations

import struct
from operator import itemgetter
from typing import Final, NamedTuple

from .linux.process import SYS_RESTART_SYSCALL

ARCHITECTURE: Final = "x86_64"

CODE: Final = bytes.fromhex(
    "488b034885c0784e488b7b08488b7310488b53184c8b53204c8b43284c8b4b30"
    "89c00f0548894338483d01f0ffff7206f643040174204883c340ebc40f054989"
    "c4eb130f054989c44885c0750931ffb83c0000000f05b8ea0000008bbd900000"
    "008bb5940000008b95980000000f05b80e000000bf02000000488db588000000"
    "31d241ba080000000f05488d642480ff7578ffb5800000004c8b7d004c8b7508"
    "4c8b6d104c8b6518488b5d284c8b5d304c8b55384c8b4d404c8b4548488b4550"
    "488b4d58488b5560488b7568488b7d70488b6d209dc28000"
)
RUN: Final = 0x00  # offsets into CODE
ONE: Final = 0x3C
SPLIT: Final = 0x43
NOTIFY: Final = 0x56
CODE_BYTES: Final = 256  # CODE, padded
CONTEXT_BYTES: Final = 192

RECORD_BYTES: Final = 64
TOLERATE: Final = 1 << 32  # added to a call's number: go on after an error
END_OF_TABLE: Final = struct.pack("<q", -1)

# A process that only waits for children and exits as the last one did:
#   sub rsp,16; 1: wait4(-1, rsp, __WALL, 0); EINTR → 1; error → 2; ebx = status; → 1
#   2: exit_group(signalled ? 128 + signal : status >> 8)
REAPER: Final = bytes.fromhex(
    "4883ec10b83d00000048c7c7ffffffff4889e6ba000000404531d20f054883f8"
    "fc74e14885c078058b1c24ebd789dfc1ef0881e7ff00000089d983e17f74068d"
    "b980000000b8e70000000f05"
)

REGISTER_NAMES: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds",
    "es", "fs", "gs",
)  # fmt: skip
_LAYOUT = struct.Struct("<27Q")
_in_order = itemgetter(*REGISTER_NAMES)
_RIP, _R12 = (struct.Struct(f"<{8 * REGISTER_NAMES.index(name)}xQ") for name in ("rip", "r12"))
USER_CS_64: Final = 0x33

_U64 = 0xFFFFFFFFFFFFFFFF
ERESTARTSYS: Final = -512
ERESTARTNOINTR: Final = -513
ERESTARTNOHAND: Final = -514
ERESTART_RESTARTBLOCK: Final = -516
EINTR: Final = -4

# System calls that answer a plain EINTR when a tracer stops them though no signal came: the epoll
# family, sigtimedwait, semaphores, io_getevents and sockets with a timeout (signal(7)). close(2)
# and connect(2) are not here: repeating them would not be the same.
INTERRUPTED_BY_STOPS: Final = frozenset(
    {232, 281, 441, 128, 65, 220, 208, 333, 45, 47, 44, 46, 43, 288, 0, 19, 1, 20, 299, 307, 202}
)


class Call(NamedTuple):
    """One system call for a table; `tolerate` lets the table go on when it fails."""

    number: int
    arguments: tuple[int, ...] = ()
    tolerate: bool = False
    what: str = ""


_RECORD = struct.Struct("<8Q")


def pack_call(number: int, arguments: tuple[int, ...], tolerate: bool) -> bytes:
    """One record of a table; at most six arguments."""
    try:
        return _RECORD.pack(
            number | TOLERATE if tolerate else number, *arguments, *_NOTHING[len(arguments) :], 0
        )
    except struct.error:  # negative arguments, two's complement
        return pack_call(number, tuple(a & _U64 for a in arguments), tolerate)


_NOTHING = (0, 0, 0, 0, 0, 0)


def unpack_registers(content: bytes) -> dict[str, int]:
    """NT_PRSTATUS bytes as names and unsigned values.

    Of a thread in 32-bit code, whose set is another (struct user_regs_struct32), only cs is told,
    by which it is refused; the rest looks as if there were nothing to put back.
    """
    if len(content) < _LAYOUT.size:
        (cs,) = struct.unpack_from("<I", content, 52)
        return {**dict.fromkeys(REGISTER_NAMES, 0), "orig_rax": _U64, "cs": cs}
    return dict(zip(REGISTER_NAMES, _LAYOUT.unpack(content[: _LAYOUT.size]), strict=True))


def pack_registers(registers: dict[str, int]) -> bytes:
    """The bytes NT_PRSTATUS wants."""
    try:
        return _LAYOUT.pack(*_in_order(registers))
    except struct.error:  # negative numbers, two's complement
        return _LAYOUT.pack(*[value & _U64 for value in _in_order(registers)])


def place_and_result(content: bytes) -> tuple[int, int]:
    """Of NT_PRSTATUS bytes: where the thread is, and what the one call it has made gave."""
    return _RIP.unpack_from(content)[0], signed(_R12.unpack_from(content)[0])


SYSCALL_BYTES: Final = 2  # of the instruction


def loaded_number(code: bytes) -> int:
    """N where the five bytes before a system call are `mov eax, N` (b8 imm32); else -1."""
    return int.from_bytes(code[1:5], "little") if code[0] == 0xB8 else -1


def signed(value: int) -> int:
    """A u64 register as the signed number a system call returned."""
    return value - (1 << 64) if value >> 63 else value


def in_system_call(registers: dict[str, int]) -> bool:
    """Whether the thread was stopped inside a system call."""
    return signed(registers["orig_rax"]) >= 0


def restartable(registers: dict[str, int], *, keep_block: bool) -> dict[str, int]:
    """Registers from which the kernel itself begins an interrupted call again, or answers EINTR.

    A result of -ERESTARTNOHAND with orig_rax in place means: again if no handler runs, else EINTR.
    That is right for the calls a stop interrupts with a plain EINTR, and for those with a restart
    block (-516) in a thread that was made anew and has none (`keep_block` False): they begin again
    with their arguments, a relative timeout starting over.
    """
    if not in_system_call(registers):
        return registers
    result = signed(registers["rax"])
    if (result == EINTR and registers["orig_rax"] in INTERRUPTED_BY_STOPS) or (
        result == ERESTART_RESTARTBLOCK and not keep_block
    ):
        return {**registers, "rax": ERESTARTNOHAND & _U64}
    return registers


def rewind(registers: dict[str, int]) -> dict[str, int]:
    """Registers as the kernel would set them to begin an interrupted call again, no handler run."""
    registers = restartable(registers, keep_block=True)
    if not in_system_call(registers):
        return registers
    result = signed(registers["rax"])
    if result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
        number = registers["orig_rax"]
    elif result == ERESTART_RESTARTBLOCK:
        number = SYS_RESTART_SYSCALL
    else:
        return {**registers, "orig_rax": _U64}
    return {**registers, "rax": number, "rip": registers["rip"] - 2, "orig_rax": _U64}


def pack_context(registers: dict[str, int], mask: int, tgid: int, tid: int, signal: int) -> bytes:
    """The context block with which a thread without tracer goes on from `registers`."""
    names = REGISTER_NAMES[:15]
    return (
        struct.pack("<15Q", *[registers[name] for name in names])
        + struct.pack("<QQQ", registers["rip"], registers["eflags"], mask)
        + struct.pack("<III", tgid, tid, signal)
    ).ljust(CONTEXT_BYTES, b"\0")


def tiny_executable(code: bytes, address: int, memory_bytes: int = 4096) -> bytes:
    """A static ELF file of one page of `code` loaded at `address`; entry at its first byte.

    Source: elf(5).
    """
    offset = 0x1000
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, offset, address, address, len(code), memory_bytes, 0x1000)
    return (header + load).ljust(offset, b"\0") + code


def required_features(xstate: bytes) -> int:
    """The XSAVE feature bits in use (xstate_bv) of an XSAVE area; Intel SDM vol. 1 13.4."""
    return struct.unpack_from("<Q", xstate, 512)[0] if len(xstate) >= 576 else 3


def enabled_features(xstate: bytes) -> int:
    """XCR0 as the kernel reports it in the software-reserved bytes (offset 464)."""
    return struct.unpack_from("<Q", xstate, 464)[0] if len(xstate) >= 576 else 3
