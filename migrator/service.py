"""`python -m lzy.migrator.service`: the migrator of one home, in the foreground.

It decides about all nodes, round after round (`loop`), and answers for all of them (`api`) at
`LZY_HOME/run/migrator.sock` and, for other machines, at the address in `fleet/migrator.json`;
where the nodes are of this machine, in their network. `lzy up` runs it under a supervisor.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

from ..agent.authority import fleet_folder, server_context
from ..agent.http import Server
from ..agent.network import FABRIC_ADDRESS, enter_fabric, has_fabric
from ..agent.voice import speak_safely
from ..checkpoint.errors import LzyError
from ..checkpoint.home import home
from ..checkpoint.linux.detached import set_name
from .api import Api
from .calls import Calls
from .fleet import Fleet
from .loop import UNREACHABLE_PAUSE_S, Loop, log


def main() -> None:
    """Run the migrator until SIGTERM."""
    set_name("lzy-migrator")
    speak_safely()
    folder = home()
    os.umask(0o077)
    (folder / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
    if has_fabric(folder):
        enter_fabric(folder)
    asyncio.run(_run(folder))


def migrator_address(folder: Path) -> str:
    """HOST:PORT where it listens for other machines; empty: nowhere."""
    try:
        found = json.loads((fleet_folder(folder) / "migrator.json").read_bytes())
        return str(found["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


async def _run(folder: Path) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    fleet = Fleet(folder)
    hurried = asyncio.Event()

    def hurry() -> None:
        loop.call_soon_threadsafe(hurried.set)

    api = Api(fleet, hurry)
    server = Server(api.answer)
    mode = 0o666 if os.environ.get("LZY_ALL_USERS") else 0o600
    await server.listen(folder / "run" / "migrator.sock", mode)
    if address := FABRIC_ADDRESS if has_fabric(folder) else migrator_address(folder):
        context = server_context(fleet_folder(folder), guests=True)
        await server.listen_to_nodes(address, context)
    rounds = asyncio.ensure_future(_go_rounds(Loop(fleet), Calls(fleet), hurried))
    await told.wait()
    rounds.cancel()
    await server.close()
    os._exit(0)  # threads may wait for nodes that do not answer


async def _go_rounds(loop: Loop, calls: Calls, hurried: asyncio.Event) -> None:
    while True:
        began = time.monotonic()
        try:
            await asyncio.to_thread(calls.listen)
            pause_s = await asyncio.to_thread(loop.go_round)
        except (LzyError, KeyError, TypeError, ValueError, OSError) as error:
            log(f"{type(error).__name__}: {error}")
            pause_s = UNREACHABLE_PAUSE_S
        left_s = max(pause_s - (time.monotonic() - began), 0.01)
        try:
            async with asyncio.timeout(left_s):
                await hurried.wait()
        except TimeoutError:
            continue
        hurried.clear()


if __name__ == "__main__":
    main()
