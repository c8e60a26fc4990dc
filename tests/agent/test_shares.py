"""What a session is bounded to is never less than what it holds: nobody is killed for asking."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from service import Service

from lzy.agent.cgroups import Cgroup, least_memory_bytes
from lzy.checkpoint.errors import LzyError

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

GROWS = """
import hashlib, os
print('ready', flush=True)
held = b''
while True:
    held += os.urandom(int(input()) << 20)
    print(len(held) >> 20, hashlib.sha256(held).hexdigest(), flush=True)
"""


def test_bound_is_never_below_what_it_holds(start: Start, service: Service) -> None:
    """Less than it holds is refused with how much would do; if it has grown since it asked, it
    wakes with a bound above that, and all of its memory can be touched."""
    program = start(command=[sys.executable, "-c", GROWS]).await_ready()
    service.begin().set()
    service.attach(program)
    held = program.ask("24")
    service.do("checkpoint")
    with pytest.raises(LzyError, match="would be killed") as refused:
        service.do("requests", requests={"memory_bytes": 24 << 20})
    assert "M at least" in refused.value.remedy
    assert service.look()["requests"]["memory_bytes"] == 0
    session = service.look()
    held_bytes = max(session["memory_bytes"], session["image_bytes"])
    asked_bytes = least_memory_bytes(held_bytes) + (4 << 20)
    service.do("requests", requests={"memory_bytes": asked_bytes})
    held = program.ask("96")
    service.do("hibernate")
    program.await_end()
    program.adopt(service.do("wake")["session"]["pid"])
    try:
        assert program.ask("0") == held
        session = service.look()
        bound_bytes = session["memory_limit_bytes"]
        assert bound_bytes == 0 or bound_bytes > session["image_bytes"] > asked_bytes
        service.do("requests", requests={"memory_bytes": asked_bytes})  # what it has asked for
    finally:
        program.end()
    service.do("detach")
    assert not Cgroup.inside(service.home, "calm", make=False).folders
