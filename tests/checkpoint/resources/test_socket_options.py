"""Every socket option that can be read and set is kept."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest

from lzy.checkpoint.linux import sockets as kernel

PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}


def _set_all(sock: socket.socket) -> set[str]:
    """Set each option to something unusual where that is possible; the names of those changed."""
    changed = set()
    for name, value in kernel.options_of(sock).items():
        if name in ("SO_BINDTODEVICE", "TCP_CONGESTION", "TCP_CORK"):
            continue  # would need a device, a module, or hold back the test's own bytes
        number = int.from_bytes(value[:4], "little", signed=True)
        for wanted in (1 - number if number in (0, 1) else number + 3, 3, 1000):
            unusual = struct.pack("=i", wanted) + value[4:]
            if name in ("SO_RCVTIMEO", "SO_SNDTIMEO"):
                unusual = struct.pack("=qq", 30, 0)
            try:
                kernel.set_option(sock, name, unusual)
            except OSError:
                continue
            if kernel.options_of(sock)[name] != value:
                changed.add(name)
                break
    return changed


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
@pytest.mark.parametrize("family", ["AF_UNIX", "AF_INET", "AF_INET6"])
def test_options_are_the_same_after_a_cycle(
    cycle: Any, family: str, kind: str, connected: bool
) -> None:
    """Each option that was changed has the value of before, on fresh and connected sockets."""
    domain, type_ = getattr(socket, family), getattr(socket, kind)
    protocol = 0 if domain == socket.AF_UNIX else PROTOCOLS[type_]

    def hold() -> Any:
        if connected and domain == socket.AF_UNIX:
            one, two = socket.socketpair(domain, type_)
        elif connected:
            host = "::1" if domain == socket.AF_INET6 else "127.0.0.1"
            two = socket.socket(domain, type_, protocol)
            two.bind((host, 0))
            one = socket.socket(domain, type_, protocol)
            if type_ == socket.SOCK_STREAM:
                two.listen()
                one.connect(two.getsockname())
                two = two.accept()[0]
            else:
                one.connect(two.getsockname())
        else:
            one = two = socket.socket(domain, type_, protocol)
        changed = _set_all(one)
        options = kernel.options_of(one)
        os.dup(two.fileno())
        return os.dup(one.fileno()), changed, options

    def prove(number: int) -> dict[str, bytes]:
        return kernel.options_of(socket.socket(fileno=number))

    number, changed, before = cycle.describe(hold)
    after = cycle.restore(lambda: prove(number))
    if connected:
        # Binding to the address of old sets it, and means nothing once connected.
        after.pop("IPV6_V6ONLY", None)
    assert {n: v for n, v in after.items() if v != before[n]} == {}
    assert len(changed) > (8 if domain == socket.AF_UNIX else 15)
