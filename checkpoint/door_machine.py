"""The x86-64 code that starts a thread of lzy's inside an interpreter, and what that thread runs.

`BORROW` runs on a thread that waits in a system call, on a stack of its own, with everything that
C code may clobber kept: it calls pthread_create and goes back. Registers, signal mask and flags are
put back by the code of `machine` behind which it lies; floating point and `errno` by itself.
`VISIT` is what the new thread runs: it waits for the GIL like every thread, looks whether it is
still wanted, has the interpreter run a text in a namespace of its own, copies the bytes that the
text called `answer`, and ends.

Both find everything in the *mailbox* (rbx), whose layout `pack_mailbox` has. The source of the
code, from which `CODE` was assembled (GNU as, intel syntax; F(n) is `[rbx+192+8*n]`, the address of
function n of `FUNCTIONS`):

    borrow: cld; mov r13,rsp; mov rsp,[rbx+80]
            mov eax,-1; mov edx,-1; xsave64 [rbx+4096]
            call F(14); mov r14,rax; mov r15d,[rax]                    # errno
            lea rdi,[rbx+128]; call F(15)                              # pthread_attr_init
            lea rdi,[rbx+128]; mov esi,1; call F(16)                   # PTHREAD_CREATE_DETACHED
            lea rdi,[rbx+128]; mov rsi,[rbx+64]; mov rdx,[rbx+72]; call F(17)
            test eax,eax; jnz 1f
            lea rdi,[rbx+104]; lea rsi,[rbx+128]; mov rdx,[rbx+48]; mov rcx,rbx; call F(18)
    1:      mov r12d,eax; mov [r14],r15d
            mov eax,-1; mov edx,-1; xrstor64 [rbx+4096]
            mov rsp,r13; jmp [rbx+56]                                  # `machine`: notify
    visit:  push rbx; push r12; push r13; push r14; push r15; mov rbx,rdi
            mov r15d,3; call F(0); test eax,eax; jz 6f                 # no interpreter (yet)
            call F(1); mov r13d,eax                                    # PyGILState_Ensure
            mov r15d,2; xor eax,eax; mov ecx,1; lock cmpxchg [rbx],ecx; jnz 5f  # cancelled
            call F(3); mov r12,rax; test rax,rax; jz 4f                # the namespace
            call F(4); test rax,rax; jz 3f
            mov rdi,r12; mov rsi,[rbx+96]; mov rdx,rax; call F(5)      # its __builtins__
            mov rdi,[rbx+32]; mov esi,257; mov rdx,r12; mov rcx,r12; xor r8d,r8d
            call F(6); test rax,rax; jz 3f; mov rdi,rax; call F(7)     # Py_file_input
            mov rdi,r12; mov rsi,[rbx+88]; call F(8); test rax,rax; jz 3f
            mov r14,rax; mov rdi,rax; call F(10); test rax,rax; jz 3f
            xchg r14,rax; mov rdi,rax; call F(9); mov [rbx+8],rax
            mov r15d,4; cmp rax,[rbx+16]; ja 3f                        # longer than there is room
            mov rcx,rax; mov rsi,r14; mov rdi,[rbx+24]; rep movsb; mov r15d,1
    3:      call F(11); mov rdi,r12; call F(12); mov rdi,r12; call F(7)
    4:      call F(11)
            cmp r15d,1; jnz 5f; cmp qword ptr [rbx+112],0; jz 5f       # is a list of pools to come?
            mov [rbx+4],r15d; mov eax,4; xchg [rbx],eax                # then wait for it
            mov r14d,[rbx+112]                                         # so many ms
    7:      cmp dword ptr [rbx],5; jz 8f
            push 1000000; push 0; mov rdi,rsp; xor esi,esi; mov eax,35; syscall; add rsp,16
            dec r14d; jnz 7b
            mov eax,4; mov ecx,1; lock cmpxchg [rbx],ecx; jz 5f        # none came, nor will
    8:      mov r12,[rbx+24]
    9:      mov r14,[r12]; test r14,r14; jz 5f                         # a pool: as if never used
            mov dword ptr [r14+36],0xffff                              # DUMMY_SIZE_IDX
            lea rdi,[r14+48]; mov ecx,506; xor eax,eax; rep stosq      # the rest of its first page
            lea rdi,[r14+4096]; mov esi,12288; mov edx,4; mov eax,28; syscall  # MADV_DONTNEED
            add r12,8; jmp 9b
    5:      mov edi,r13d; call F(2)
            cmp r15d,1; jnz 6f
            mov rax,[rbx+192+8*13]; test rax,rax; jz 6f
            xor edi,edi; call rax                                      # malloc_trim
    6:      mov [rbx+4],r15d; mov eax,3; xchg [rbx],eax; xor eax,eax
            pop r15; pop r14; pop r13; pop r12; pop rbx; ret

Sources: System V ABI AMD64, Intel SDM vol. 1 ch. 13 (XSAVE), Python/C API ("Non-Python created
threads", stable since 3.8), pthread_attr_setstack(3).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

CODE: Final = bytes.fromhex(
    "fc4989e5488b6350b8ffffffffbaffffffff480faea300100000ff9330010000"
    "4989c6448b38488dbb80000000ff9338010000488dbb80000000be01000000ff"
    "9340010000488dbb80000000488b7340488b5348ff934801000085c07518488d"
    "7b68488db380000000488b53304889d9ff93500100004189c445893eb8ffffff"
    "ffbaffffffff480faeab001000004c89ecff63385341544155415641574889fb"
    "41bf03000000ff93c000000085c00f849a010000ff93c80000004189c541bf02"
    "00000031c0b901000000f00fb10b0f855b010000ff93d80000004989c44885c0"
    "0f84ad000000ff93e00000004885c00f84860000004c89e7488b73604889c2ff"
    "93e8000000488b7b20be010100004c89e24c89e14531c0ff93f00000004885c0"
    "74594889c7ff93f80000004c89e7488b7358ff93000100004885c0743e4989c6"
    "4889c7ff93100100004885c0742d49964889c7ff93080100004889430841bf04"
    "000000483b431077124889c14c89f6488b7b18f3a441bf01000000ff93180100"
    "004c89e7ff93200100004c89e7ff93f8000000ff93180100004183ff010f858c"
    "00000048837b70000f848100000044897b04b8040000008703448b7370833b05"
    "742c6840420f006a004889e731f6b8230000000f054883c41041ffce75dfb804"
    "000000b901000000f00fb10b74414c8b63184d8b34244d85f6743441c74624ff"
    "ff0000498d7e30b9fa01000031c0f348ab498dbe00100000be00300000ba0400"
    "0000b81c0000000f054983c408ebc34489efff93d00000004183ff017510488b"
    "83280100004885c0740431ffffd044897b04b803000000870331c0415f415e41"
    "5d415c5bc3"
)
BORROW: Final = 0x00  # offsets into CODE
VISIT: Final = 0x94

FUNCTIONS: Final = (
    "Py_IsInitialized", "PyGILState_Ensure", "PyGILState_Release", "PyDict_New",
    "PyEval_GetBuiltins", "PyDict_SetItemString", "PyRun_StringFlags", "Py_DecRef",
    "PyDict_GetItemString", "PyBytes_Size", "PyBytes_AsString", "PyErr_Clear", "PyDict_Clear",
    "malloc_trim", "__errno_location", "pthread_attr_init", "pthread_attr_setdetachstate",
    "pthread_attr_setstack", "pthread_create",
)  # fmt: skip
OF_PYTHON: Final = FUNCTIONS[:13]
OF_LIBC: Final = FUNCTIONS[13:]

WAITING: Final = 0  # states: for the GIL
RUNNING: Final = 1
CANCELLED: Final = 2
DONE: Final = 3
PAUSED: Final = 4  # has answered, holds the GIL, and waits for a list of pools
EMPTYING: Final = 5

ANSWERED: Final = 1  # outcomes
FAILED: Final = 2
NO_INTERPRETER: Final = 3
TOO_LONG: Final = 4

STATE_BYTES: Final = 128  # of a mailbox: what `unpack_state` reads
_KEYS: Final = 512  # "answer" and "__builtins__"
_XSAVE: Final = 4096  # as in the code; 64-byte aligned
_XSAVE_BYTES: Final = 16384  # with AMX it is 11008
TEXT: Final = _XSAVE + _XSAVE_BYTES
TEXT_BYTES: Final = 65536
MAILBOX_BYTES: Final = TEXT + TEXT_BYTES


class Stacks(NamedTuple):
    """Where the two stacks are: the visitor's start and length, and the end of the borrower's."""

    visitor: int
    visitor_bytes: int
    borrower_end: int


def pack_mailbox(
    address: int,
    text: bytes,
    functions: dict[str, int],
    stacks: Stacks,
    answer: tuple[int, int],
    visit: int,
    notify: int,
    token: int,
    asker: int,
    *,
    pause_ms: int,
) -> bytes:
    """The mailbox's bytes for `address`: what runs (`text`, UTF-8), with what, and to where.

    `answer` is (address, capacity in bytes); `visit` and `notify` are addresses of code. `token`
    and `asker` (u64 each) tell whose mailbox it is. For at most `pause_ms` the visitor keeps the
    GIL after its answer, until it is handed a list of free pools (see `pools`) to empty.
    """
    if len(text) >= TEXT_BYTES or b"\0" in text:
        raise ValueError(f"a text of {len(text)} bytes does not fit")
    answer_key, builtins_key = b"answer\0", b"__builtins__\0"
    keys = address + _KEYS
    head = struct.pack(
        "<IIQQQQQQQQQQQQQQQ",
        WAITING, 0, 0, answer[1], answer[0], address + TEXT, token, visit, notify,
        stacks.visitor, stacks.visitor_bytes, stacks.borrower_end, keys, keys + len(answer_key),
        0, pause_ms, asker,
    )  # fmt: skip
    table = struct.pack(f"<{len(FUNCTIONS)}Q", *[functions.get(name, 0) for name in FUNCTIONS])
    content = head.ljust(192, b"\0") + table
    content = content.ljust(_KEYS, b"\0") + answer_key + builtins_key
    return content.ljust(TEXT, b"\0") + text + b"\0"


class State(NamedTuple):
    """The head of a mailbox."""

    state: int
    outcome: int
    answer_bytes: int
    token: int
    asker: int


def unpack_state(content: bytes | bytearray) -> State:
    """A mailbox's first STATE_BYTES."""
    state, outcome, length_bytes = struct.unpack_from("<IIQ", content)
    (token,) = struct.unpack_from("<Q", content, 40)
    (asker,) = struct.unpack_from("<Q", content, _ASKER)
    return State(state, outcome, length_bytes, token, asker)


_ASKER: Final = 120


def give_up(content: bytearray) -> None:
    """Change a mailbox's first STATE_BYTES: nobody asks any more, and what waits does not begin."""
    struct.pack_into("<Q", content, _ASKER, 0)
    if unpack_state(content).state == WAITING:
        struct.pack_into("<I", content, 0, CANCELLED)


def hand_pools(content: bytearray) -> None:
    """Change a mailbox's first STATE_BYTES: where the answer was stand pools to empty, then 0."""
    struct.pack_into("<I", content, 0, EMPTYING)
