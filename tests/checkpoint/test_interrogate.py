"""What a stopped process is asked is what it has set up itself."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint import interrogate, proc
from lzy.checkpoint.interrogate import decode
from lzy.checkpoint.linux import process, ptrace
from lzy.checkpoint.tracee import stopped

SET_UP = """
import json, struct
libc.prctl(8 * 0 + 29, 123456, 0, 0, 0)                        # timer slack
libc.prctl(36, 1, 0, 0, 0)                                    # child subreaper
libc.prctl(1, 10, 0, 0, 0)                                    # parent death signal
libc.prctl(41, 1, 0, 0, 0)                                    # no transparent huge pages
os.umask(0o137)
stack = allocate(65536)
libc.sigaltstack(struct.pack("<QiiQ", stack, 0, 0, 65536), None)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, 40])
signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
for value in (7, 8):
    info = struct.pack("<iiiiiiQ", 40, 0, -1, 0, os.getpid(), 0, value).ljust(128, b"\\0")
    assert libc.syscall(129, os.getpid(), 40, info) == 0
signal.setitimer(signal.ITIMER_REAL, 500, 7)
signal.setitimer(signal.ITIMER_PROF, 600)
libc.sbrk.restype = ctypes.c_void_p
other = threading.Thread(target=hear)
other.start()
os.sched_setaffinity(other.native_id, {0})
os.nice(3)
say("ready")
say(json.dumps([stack, libc.sbrk(0), other.native_id, hash(os.getcwd())]))
other.join(); hear()
"""


def test_threads_and_process_tell_what_they_set_up() -> None:
    """Stacks, masks, queues of signals with their values, timers, switches, priorities."""
    import json

    with living(SET_UP) as subject:
        stack, heap_end, tid, _ = json.loads(subject.hear())
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            threads = interrogate.describe_threads(tracee)
            own = interrogate.describe_process(tracee, proc.posix_timers(subject.pid))
            own |= interrogate.describe_inherited(subject.pid)
        leader, other = threads
        assert (leader["tid"], other["tid"]) == (subject.pid, tid)
        assert leader["alternate_stack"] == [stack, 0, 65536]
        assert other["alternate_stack"][1] == 2 or other["alternate_stack"][0] != stack
        assert leader["timer_slack_ns"] == 123456
        assert leader["death_signal"] == 10
        assert other["death_signal"] == 0 or other["death_signal"] == 10
        assert leader["signal_mask"] == 1 << 9 | 1 << 39
        assert [struct.unpack_from("<i", decode(i))[0] for i in leader["pending"]] == [10]
        queue = [decode(i) for i in own["pending"]]
        assert [struct.unpack_from("<iii", i)[0] for i in queue] == [40, 40]
        assert [struct.unpack_from("<Q", i, 24)[0] for i in queue] == [7, 8]
        assert other["affinity"] == [0]
        assert {leader["nice"], other["nice"]} >= {3} or leader["nice"] == 3
        assert leader["rseq"]
        assert leader["robust_list"][1] == 24
        assert leader["clear_tid_address"]
        assert len(decode(leader["xstate"])) >= 576

        actions = own["signal_actions"]
        assert struct.unpack_from("<Q", decode(actions["12"]))[0] == 1  # SIG_IGN
        assert struct.unpack_from("<Q", decode(actions["10"]))[0] > 4096
        assert "15" not in actions
        real = struct.unpack("<4q", decode(own["interval_timers"][0]))
        assert real[0] == 7
        assert 400 < real[2] <= 500
        assert struct.unpack("<4q", decode(own["interval_timers"][2]))[2] <= 600
        assert own["umask"] == 0o137
        assert own["child_subreaper"] == 1
        assert own["no_huge_pages"] == 1
        assert own["brk"] == heap_end
        assert own["parent"] == os.getpid()
        assert not own["stopped"]
        assert own["exe"] == os.path.realpath(sys.executable)
        assert own["command_line"][1:3] == ["-I", "-S"]
        json.dumps([threads, own])
        subject.say("")


@pytest.mark.parametrize("flags", [0, 1, 2, 2 | 4, 1 | 2])
def test_locks_on_memory_to_come(flags: int) -> None:
    """mlockall(MCL_FUTURE) is known, and told from locks on the memory there is; mlockall(2)."""
    set_up = f"{flags} and libc.mlockall({flags}) and say('refused')\nsay('ready')\nhear()"
    with living(set_up) as subject, stopped(subject.pid) as tracee:
        tracee.prepare()
        own = interrogate.describe_process(tracee, [])
    assert own["future_locks"] == flags & (2 | 4)


def test_rights_are_those_of_each_thread() -> None:
    """Users, groups, capabilities and no_new_privs differ from thread to thread."""
    if os.getuid():
        pytest.fail("this test needs root, to become somebody else")
    code = """
def other():
    libc.prctl(38, 1, 0, 0, 0)
    libc.syscall(116, 2, struct.pack("<2I", 7, 8))
    libc.syscall(117, 11, 12, 13)
    say("ready"); say(threading.get_native_id()); hear()
import struct
t = threading.Thread(target=other); t.start(); t.join(); hear()
"""
    with living(code) as subject:
        tid = int(subject.hear())
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            leader, other = interrogate.describe_threads(tracee)
        assert leader["rights"]["Uid"].split() == ["0"] * 4
        assert other["tid"] == tid
        assert other["rights"]["Uid"].split() == ["11", "12", "13", "12"]
        assert other["rights"]["Groups"].split() == ["7", "8"]
        assert (leader["no_new_privileges"], other["no_new_privileges"]) == (0, 1)
        subject.say("")


def test_numbers_are_those_of_the_kernel() -> None:
    """rseq and robust lists as the kernel knows them for the present thread."""
    with living("say('ready'); hear()") as subject, stopped(subject.pid) as tracee:
        tracee.prepare()
        (thread,) = interrogate.describe_threads(tracee)
        assert thread["rseq"] == list(ptrace.rseq_configuration(subject.pid) or ())
        assert thread["rseq"][2] == 0x53053053
        assert tuple(thread["robust_list"]) == process.robust_list(subject.pid)
        assert thread["scheduling"] == interrogate.encode(process.scheduling(subject.pid))
