"""Children that have ended and were not waited for yet, of this process and of a child of its."""

import functools
import os
import resource
import signal

from dialogue import Proof, converse
from kin import Answer, Child, await_zombie, end_at, state_of

ENDS = {"exit 0": 0, "exit 3": 3 << 8, "SIGKILL": 9, "SIGTERM": 15, "SIGSEGV": 11, "SIGRTMIN": 34}


def make_zombie(status: int, *, group: int = -1) -> int:
    pid = os.fork()
    if not pid:
        if group >= 0:
            os.setpgid(0, group)
        if status & 0x7F:
            end_at(status)
        os._exit(status >> 8)
    await_zombie(pid)
    return pid


def be_parent() -> Answer:
    pid = make_zombie(5 << 8)
    return lambda _: os.waitpid(pid, 0) == (pid, 5 << 8)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    zombies = {name: make_zombie(status) for name, status in ENDS.items()}
    leader = make_zombie(4 << 8, group=0)  # whose group has one more member, who lives
    follower = Child(lambda: str)
    os.setpgid(follower.pid, leader)
    parent = Child(be_parent)
    heard = []
    signal.signal(signal.SIGCHLD, lambda number, _: heard.append(number))

    @functools.lru_cache(None)
    def wait() -> Proof:
        proof = {f"{name} is a zombie": state_of(pid) == "Z" for name, pid in zombies.items()}
        silent = not heard  # They ended before anybody listened, and not again.
        with open(f"/proc/{leader}/stat") as file:
            group = int(file.read().rpartition(")")[2].split()[2])
        proof["zombie that leads a group"] = group == leader == os.getpgid(follower.pid)
        for name, pid in zombies.items():
            told = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            proof[f"{name}: code"] = told.si_status == (ENDS[name] >> 8 or ENDS[name])
            proof[name] = os.waitpid(pid, 0) == (pid, ENDS[name])
        proof["group leader"] = os.waitpid(leader, 0) == (leader, 4 << 8)
        return {**proof, "grandchild": parent.ask("wait") == "True", "silent": silent}

    def prove() -> Proof:
        proof = wait()
        pid = os.fork()  # what ends from now on is heard of
        if not pid:
            os._exit(6)
        proof["another one"] = os.waitpid(pid, 0)[1] == 6 << 8
        return {**proof, "heard": bool(heard), "group": os.getpgid(follower.pid) == leader}

    converse(prove, lambda: os.waitpid(zombies["SIGKILL"], 0))


main()
