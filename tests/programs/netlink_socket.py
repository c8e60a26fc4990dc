"""Netlink sockets: one that asks for the network's interfaces, one that listens to what changes."""

import os
import select
import socket
import struct

from dialogue import Proof, converse

GETLINK, NEWLINK, DONE = 18, 16, 3
REQUEST_DUMP = 0x301
NETLINK, ADD_MEMBERSHIP, LIST_MEMBERSHIPS, EXT_ACK = 270, 1, 9, 11
LINK, NOTIFY, IPV4_ADDRESS, NEXT_HOP = 1, 2, 5, 32


def ask_for_interfaces(sock: socket.socket, sequence: int) -> "list[int]":
    """The numbers of all interfaces, as the kernel answers."""
    question = struct.pack("<BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
    sock.send(
        struct.pack("<IHHII", 16 + len(question), GETLINK, REQUEST_DUMP, sequence, 0) + question
    )
    found = []
    while True:
        answer = sock.recv(1 << 16)
        while answer:
            length, kind, _, echoed, _ = struct.unpack_from("<IHHII", answer)
            assert echoed == sequence
            if kind == DONE:
                return sorted(found)
            assert kind == NEWLINK
            found.append(struct.unpack_from("<i", answer, 20)[0])
            answer = answer[(length + 3) & ~3 :]


def main() -> None:
    asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    asking.bind((0, 0))
    asking.setsockopt(NETLINK, EXT_ACK, 1)
    port = asking.getsockname()
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0)
    listening.bind((0, 1 << (LINK - 1)))
    for group in (IPV4_ADDRESS, NEXT_HOP):
        listening.setsockopt(NETLINK, ADD_MEMBERSHIP, group)
    listening.setblocking(False)
    groups = listening.getsockopt(NETLINK, LIST_MEMBERSHIPS, 64)
    fresh = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
    interfaces = sorted(number for number, _ in socket.if_nameindex())
    assert ask_for_interfaces(asking, 1) == interfaces
    poll = select.epoll()
    poll.register(listening, select.EPOLLIN)
    sequence = 1

    def prove() -> Proof:
        nonlocal sequence
        sequence += 1
        proof: Proof = {"port": asking.getsockname() == port and port[0] == os.getpid()}
        proof["option"] = asking.getsockopt(NETLINK, EXT_ACK) == 1
        proof["groups"] = listening.getsockopt(NETLINK, LIST_MEMBERSHIPS, 64) == groups
        proof["unbound"] = fresh.getsockname() == (0, 0)
        proof["answers"] = ask_for_interfaces(asking, sequence) == interfaces
        proof["quiet"] = poll.poll(0) == []
        return proof

    converse(prove, lambda: asking.setsockopt(NETLINK, EXT_ACK, 0))


main()
