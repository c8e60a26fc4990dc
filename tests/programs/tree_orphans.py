"""Processes whose parents have ended: taken in by a subreaper, and told so by a death signal."""

import os
import signal

from clib import call
from dialogue import Proof, converse
from kin import Answer, Child

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

told: "list[int]" = []


def become_orphan(*, leads: bool = False) -> "tuple[int, int, int]":
    """(its pid, where it listens, where it answers): a process whose parent ends at once.

    `leads`: its parent led a session, which it is of, as daemons are.
    """
    listen, speak = os.pipe(), os.pipe()
    parent = os.fork()
    if not parent:
        if leads:
            os.setsid()
        if os.fork():
            os._exit(0)
        while True:
            word = os.read(listen[0], 1)
            if not word:
                os._exit(0)
            os.write(speak[1], f"{os.getpid()} {os.getppid()}\n".encode())
    assert os.waitpid(parent, 0) == (parent, 0)
    os.write(listen[1], b"?")
    pid, adopted_by = map(int, os.read(speak[0], 100).split())
    assert adopted_by == os.getpid()
    return pid, listen[1], speak[0]


def be_reaper() -> Answer:
    """A subreaper below the other one, with an orphan of its own."""
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid, listen, speak = become_orphan()

    def answer(_: str) -> bool:
        os.write(listen, b"?")
        return os.read(speak, 100).split() == [b"%d" % pid, b"%d" % os.getpid()]

    return answer


def be_leader() -> Answer:
    """Leads a session, of which one is that its uncle has taken in."""
    os.setsid()
    parent = os.fork()
    if not parent:
        if os.fork():
            os._exit(0)
        while os.getppid() == os.getppid() != root:
            pass
        os.write(mourning[1], b"%d" % os.getpid())
        signal.pause()
    os.waitpid(parent, 0)
    nephew = int(os.read(mourning[0], 20))
    return lambda _: nephew


def be_mourner() -> Answer:
    """Is told by a signal when its parent ends."""
    signal.signal(signal.SIGUSR2, lambda number, _: told.append(number))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
    return lambda _: len(told)


def be_parent_of_mourner() -> Answer:
    """Its child says to the root, by a pipe, that it was told of its end."""
    child = os.fork()
    if not child:
        be_mourner()
        os.write(mourning[1], b"r")
        while not told:
            signal.pause()
        os.write(mourning[1], b"told")
        os._exit(0)
    assert os.read(mourning[0], 1) == b"r"
    return lambda word: os._exit(0) if word == "end" else child


mourning = os.pipe()
root = os.getpid()


def main() -> None:
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid, listen, speak = become_orphan()
    daemon, _, _ = become_orphan(leads=True)
    leader = Child(be_leader)
    nephew = int(leader.ask("who"))
    sessions = [os.getsid(pid) for pid in (daemon, nephew)]
    assert sessions[0] not in (daemon, os.getsid(0))
    assert sessions[1] == leader.pid
    reaper, mourner, parent = Child(be_reaper), Child(be_mourner), Child(be_parent_of_mourner)
    grandchild = int(parent.ask("who"))
    done: Proof = {}

    def prove() -> Proof:
        os.write(listen, b"?")
        proof = {
            "orphan": os.read(speak, 100).split() == [b"%d" % pid, b"%d" % os.getpid()],
            "sessions": [os.getsid(pid) for pid in (daemon, nephew)] == sessions,
            "groups": [os.getpgid(pid) for pid in (daemon, nephew)] == sessions,
            "orphan of a child": reaper.ask("") == "True",
            "not told of an end that was none": mourner.ask("") == "0",
        }
        if not done:
            parent.say("end")
            done["parent has ended"] = os.waitpid(parent.pid, 0) == (parent.pid, 0)
            done["its child was told"] = os.read(mourning[0], 4) == b"told"
            done["and was ours"] = os.waitpid(grandchild, 0) == (grandchild, 0)
        late, _, _ = become_orphan()
        os.kill(late, signal.SIGKILL)
        return {**proof, **done, "still takes in": os.waitpid(late, 0) == (late, 9)}

    def spoil() -> None:
        os.kill(mourner.pid, signal.SIGUSR2)
        while mourner.ask("") == "0":
            pass

    converse(prove, spoil)


main()
