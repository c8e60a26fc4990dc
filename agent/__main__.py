"""`python -m lzy.agent`: one agent, in the foreground, for the home that LZY_HOME names.

`lzy up` runs it under a supervisor (`supervisor`). It ends at SIGTERM or SIGINT, and leaves every
session as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import sys
import time
from pathlib import Path

from ..checkpoint.errors import LzyError, StoreUnavailable
from ..checkpoint.home import home
from ..checkpoint.linux.detached import set_name
from ..checkpoint.resources.kind import all_kinds
from .voice import speak_safely

_LOCK_PATIENCE_S = 20.0


def main() -> None:
    """Run the agent until it is told to end."""
    set_name("lzy-agent")
    speak_safely()
    os.umask(0o077)
    folder = home()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _take_lock(folder / "agent.lock")
    try:
        asyncio.run(_run(folder))
    except LzyError as error:
        sys.exit(f"lzy-agent: {error}")
    finally:
        os.close(lock)


def _take_lock(path: Path) -> int:
    """Be the only agent of this home; one that was killed may take a moment to be gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"another agent runs for {path.parent}")
            time.sleep(0.05)


async def _run(folder: Path) -> None:
    from .api import Api
    from .authority import agent_place, is_member, server_context
    from .http import Server
    from .node import Agent
    from .watching import Watcher

    all_kinds()  # loaded now, so that operations find them in memory
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    agent = Agent(folder)
    with contextlib.suppress(
        StoreUnavailable
    ):  # a full disk: sessions are looked after all the same
        agent.state.tell("", 0, "agent_began", f"process {os.getpid()}")
    agent.start()
    watcher = Watcher(agent)
    server = Server(Api(agent, watcher).answer)
    mode = 0o666 if os.environ.get("LZY_ALL_USERS") else 0o600
    await server.listen(folder / "run" / "agent.sock", mode)
    if agent.identity.address and is_member(folder):
        context = server_context(agent_place(folder))
        await server.listen_to_nodes(agent.identity.address, context)
    agent.spawn(watcher.go_rounds())
    agent.spawn(agent.limits.go_rounds())
    gc.collect()
    gc.freeze()  # what is here now stays: children that are forked need not copy it
    await told.wait()
    with contextlib.suppress(StoreUnavailable):
        agent.state.tell("", 0, "agent_ended", f"process {os.getpid()}")
    stopping = asyncio.ensure_future(server.close())
    await agent.stop()
    await stopping


if __name__ == "__main__":
    main()
