"""A notebook kernel, and a front end that talks to it wherever it is and whatever becomes of it."""

from __future__ import annotations

import queue
import subprocess
import time
from pathlib import Path
from typing import Any

from hosting import end_lives, is_alive
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

CELL_TIMEOUT_S = 300
SUBSCRIPTION_PERIOD_S = 0.1


class KernelGone(Exception):
    """There is no kernel to talk to any more, or what it was asked has failed."""


class FrontEnd:
    """What a person types cells into: a client of the kernel of a connection file."""

    def __init__(self, connection_file: str, ip: str = "") -> None:
        self.file = connection_file
        self._connect(ip)

    def _connect(self, ip: str) -> None:
        self.client = BlockingKernelClient(connection_file=self.file)
        self.client.load_connection_file()
        if ip:
            self.client.ip = ip
        self.client.start_channels(hb=False)  # to stop it takes a second

    def move(self, ip: str) -> None:
        """Talk to the same kernel at another address."""
        self.client.stop_channels()
        self._connect(ip)

    def is_gone(self) -> bool:
        """Whether it is known that nobody will answer."""
        return False

    def await_subscription(self) -> None:
        """Return once what the kernel publishes comes through.

        A kernel publishes to who has subscribed: what it says before that, after its start or after
        the client has had to connect anew, goes nowhere. So it is asked until an answer is heard.
        """
        deadline = time.monotonic() + CELL_TIMEOUT_S
        asked = set()
        while time.monotonic() < deadline:
            asked.add(self.client.kernel_info())
            try:
                while True:
                    message = self.client.get_iopub_msg(timeout=SUBSCRIPTION_PERIOD_S)
                    if message["parent_header"].get("msg_id") in asked:
                        return
            except queue.Empty:
                if self.is_gone():
                    raise KernelGone("the kernel is gone") from None
        raise KernelGone(f"the kernel does not answer within {CELL_TIMEOUT_S} s")

    def run(self, code: str) -> str:
        """Run a cell; what it printed. Raises KernelGone if it failed or the kernel is gone."""
        deadline = time.monotonic() + CELL_TIMEOUT_S
        request = self.client.execute(code)
        printed = ""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Exception as error:  # queue.Empty, or a zmq error
                if self.is_gone():
                    raise KernelGone("the kernel is gone") from error
                if time.monotonic() > deadline:
                    raise KernelGone(f"no answer within {CELL_TIMEOUT_S} s") from error
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
            elif kind == "error":
                raise KernelGone("a cell failed: " + "\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                return printed.strip()

    def close(self) -> None:
        """Talk to it no longer."""
        self.client.stop_channels()


class Notebook(FrontEnd):
    """A kernel that is our child, as of a Jupyter server, and its front end."""

    def __init__(self, folder: Path) -> None:
        # No pipe to us and no terminal: what a kernel prints goes to its clients.
        self.manager = KernelManager(connection_file=str(folder / "kernel.json"))
        self.manager.start_kernel(
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=str(folder),
        )
        provisioner: Any = self.manager.provisioner
        self.process: subprocess.Popen[bytes] = provisioner.process
        self.pid = self.process.pid
        super().__init__(self.manager.connection_file)

    def is_gone(self) -> bool:
        return not is_alive(self.pid)

    def close(self) -> None:
        """End the kernel, whether it is the one we started or the one that came back."""
        super().close()
        end_lives(self.process)
        self.manager.cleanup_resources()
