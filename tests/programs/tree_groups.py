"""Process groups and sessions inside a tree: led by children, by siblings, by nobody any more."""

import os
import signal

from dialogue import Proof, converse
from kin import Answer, Child

heard: "list[int]" = []
hear_of, hear = os.pipe()


def be_member() -> Answer:
    """Counts the signals that come to it."""
    signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))

    def answer(word: str) -> "object":
        if word == "count":
            while len(heard) < 1:
                signal.pause()
            return len(heard)
        if word == "join a group of its own":
            return os.setpgid(0, 0)
        return len(heard)

    return answer


def be_session() -> Answer:
    """Leads a session; one child is in its group, one leads another group of that session."""
    os.setsid()
    member, leader = Child(be_member), Child(be_member)
    os.setpgid(leader.pid, leader.pid)
    family = [os.getpid(), member.pid, leader.pid]
    before = [(os.getpgid(pid), os.getsid(pid)) for pid in family]
    assert before == [(family[0], family[0]), (family[0],) * 2, (leader.pid, family[0])]
    return lambda _: [(os.getpgid(pid), os.getsid(pid)) for pid in family] == before


def main() -> None:
    member = Child(be_member)
    alone = Child(be_member)
    os.setpgid(alone.pid, alone.pid)
    joined = Child(be_member)
    os.setpgid(joined.pid, alone.pid)
    founder = os.fork()
    if not founder:
        signal.pause()
    os.setpgid(founder, founder)
    orphan = Child(be_member)
    os.setpgid(orphan.pid, founder)
    os.kill(founder, signal.SIGKILL)
    os.waitpid(founder, 0)
    session = Child(be_session)
    family = [os.getpid(), member.pid, alone.pid, joined.pid, orphan.pid, session.pid]
    before = [(os.getpgid(pid), os.getsid(pid)) for pid in family]
    assert before[4] == (founder, before[0][1])

    def prove() -> Proof:
        os.killpg(alone.pid, signal.SIGUSR1)
        os.killpg(founder, signal.SIGUSR1)
        return {
            "groups": [os.getpgid(pid) for pid in family] == [group for group, _ in before],
            "sessions": [os.getsid(pid) for pid in family] == [session for _, session in before],
            "leader heard": alone.ask("count") != "0",
            "its follower heard": joined.ask("count") != "0",
            "orphaned group heard": orphan.ask("count") != "0",
            "others did not": member.ask("how many") == "0",
            "in another session": session.ask("") == "True",
        }

    converse(prove, lambda: member.ask("join a group of its own"))


main()
