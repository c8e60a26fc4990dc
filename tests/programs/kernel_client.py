"""A front end that keeps using a notebook kernel: `kernel_client.py CONNECTION_FILE`.

Until its stdin ends it runs one cell after the other, over the connections that it made when it
began. A cell that nobody answers is asked for again, as is one of whose output not all is there:
what was on its way when a connection ended is lost. Cells are numbered, and each enters its number
in a ledger of the kernel's unless it is there already. For each line of stdin, and at the end, it
prints as JSON how many cells were answered, how many were asked for again, the longest that one
took since that was asked last, and what was wrong: nothing, if one and the same kernel has each
number once.
"""

from __future__ import annotations

import json
import queue
import select
import sys
import time

from jupyter_client.blocking.client import BlockingKernelClient

ASKS_AGAIN_S = 2.0
PATIENCE_S = 120.0
BEGIN = "import os; ledger, token = [], os.urandom(8).hex(); print('<>')"
CELL = """
{number} in ledger or ledger.append({number})
print("<", len(ledger), sum(ledger), token, os.getpid(), ">")
"""


class FrontEnd:
    """One client of a kernel, which never connects by itself anew."""

    def __init__(self, connection_file: str) -> None:
        self._client = BlockingKernelClient(connection_file=connection_file)
        self._client.load_connection_file()
        self._client.start_channels()
        self._client.wait_for_ready(PATIENCE_S)
        self.asked_again = 0

    def run(self, code: str) -> str:
        """What a cell prints; asked for until the kernel has told all of it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if (printed := self._ask(code)) is not None:
                return printed
            if time.monotonic() > deadline:
                raise SystemExit(f"nobody answers {code!r}")
            self.asked_again += 1

    def _ask(self, code: str) -> str | None:
        request = self._client.execute(code)
        printed = ""
        try:
            while True:
                message = self._client.get_iopub_msg(timeout=ASKS_AGAIN_S)
                if message["parent_header"].get("msg_id") != request:
                    continue
                kind, content = message["msg_type"], message["content"]
                if kind == "stream":
                    printed += content["text"]
                elif kind == "error":
                    raise SystemExit("\n".join(content["traceback"]))
                elif kind == "status" and content["execution_state"] == "idle":
                    break
            while True:
                reply = self._client.get_shell_msg(timeout=ASKS_AGAIN_S)
                if reply["parent_header"].get("msg_id") == request:
                    whole = printed.startswith("<") and printed.endswith(">\n")
                    return printed[1:-2] if whole else None
        except queue.Empty:
            return None


def main() -> None:
    front_end = FrontEnd(sys.argv[1])
    front_end.run(BEGIN)
    number, longest_s, wrong, tokens = 0, 0.0, [], set()

    def tell() -> None:
        told = {"cells": number, "asked_again": front_end.asked_again, "longest_s": longest_s,
                "wrong": wrong[:5]}  # fmt: skip
        print(json.dumps(told), flush=True)

    print("ready", flush=True)
    while True:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            if not sys.stdin.readline():
                break
            tell()
            longest_s = 0.0
        number += 1
        began_s = time.monotonic()
        printed = front_end.run(CELL.format(number=number))
        longest_s = max(longest_s, time.monotonic() - began_s)
        count, total, *token = printed.split()
        tokens.add(tuple(token))
        if int(count) != number or int(total) != number * (number + 1) // 2 or len(tokens) != 1:
            wrong.append(printed)
    tell()


if __name__ == "__main__":
    main()
