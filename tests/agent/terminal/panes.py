"""A tmux of a test's own: somebody's windows, in which shells and programs run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from living import list_children
from people import Terminals


class Pane:
    """What one window of tmux shows, and its keyboard."""

    def __init__(self, tmux: Tmux, target: str) -> None:
        self._tmux, self._target = tmux, target
        self.pid = int(self._ask("display-message", "#{pane_pid}"))

    def _ask(self, command: str, *words: str) -> str:
        return self._tmux.call(command, "-p", "-t", self._target, *words)

    def types(self, text: str) -> None:
        """Type it; `\\r` ends a line."""
        self._tmux.call("send-keys", "-t", self._target, "-l", text)

    def presses(self, *keys: str) -> None:
        """Press keys as tmux names them: C-c."""
        self._tmux.call("send-keys", "-t", self._target, *keys)

    def screen(self) -> list[str]:
        """The rows that are shown, without empty ones below."""
        return self._ask("capture-pane").rstrip("\n").split("\n")

    def history(self) -> list[str]:
        """The same, with what has scrolled off."""
        return self._ask("capture-pane", "-S", "-").rstrip("\n").split("\n")

    def sees(self, *rows: str) -> None:
        """Wait until these are the last rows that are shown."""
        self._see(lambda shown: shown[-len(rows) :] == list(rows), repr(rows))

    def sees_text(self, text: str) -> None:
        """Wait until that is shown somewhere."""
        self._see(lambda shown: text in "\n".join(shown), repr(text))

    def _see(self, holds: Callable[[list[str]], bool], words: str) -> None:
        try:
            self._tmux.terminals.service.wait_until(lambda: holds(self.screen()), words)
        except AssertionError as error:
            raise AssertionError(f"it never shows {words}, but {self.screen()}") from error

    def resizes(self, rows: int, columns: int) -> None:
        """Change its window."""
        size = ("-x", str(columns), "-y", str(rows))
        self._tmux.call("resize-window", "-t", self._target, *size)

    def child(self) -> int:
        """The only process that runs in its shell, once that has started it."""

        def find() -> list[int]:
            found = list_children(self.pid, descend=False)
            shell = os.readlink(f"/proc/{self.pid}/exe")
            return [pid for pid in found if os.readlink(f"/proc/{pid}/exe") != shell]

        self._tmux.terminals.service.wait_until(find, "its shell has started something")
        (pid,) = find()
        return pid

    def is_open(self) -> bool:
        return self._target in self._tmux.call("list-panes", "-a", "-F", "#{pane_id}").split()


class Tmux:
    """Its server, whose windows have 24 rows and 80 columns."""

    def __init__(self, terminals: Terminals, folder: Path) -> None:
        self.terminals = terminals
        self._socket = str(folder / "tmux")

    def call(self, *words: str) -> str:
        environment = {**os.environ, "LZY_HOME": str(self.terminals.lzy.home), "PS1": "%% "}
        environment["PATH"] = (
            f"{Path(self.terminals.lzy.executable[0]).parent}:{os.environ['PATH']}"
        )
        done = subprocess.run(
            ["tmux", "-S", self._socket, "-f", "/dev/null", *words],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.rstrip("\n")

    def begin(self, *shell: str) -> Pane:
        """The first window: a shell that has given its prompt."""
        words = shell or ("bash", "--norc", "--noprofile")
        self.call("new-session", "-d", "-x", "80", "-y", "24", *words)
        pane = Pane(self, "%0")
        pane.sees("%%")
        return pane

    def open(self, *command: str) -> Pane:
        """A window with nothing but a program."""
        return Pane(self, self.call("new-window", "-P", "-F", "#{pane_id}", *command))


@contextmanager
def begin_tmux(terminals: Terminals, folder: Path) -> Iterator[Tmux]:
    """A tmux that ends with the test, and who runs in its windows."""
    tmux = Tmux(terminals, folder)
    try:
        yield tmux
    finally:
        with suppress(subprocess.CalledProcessError):
            panes = tmux.call("list-panes", "-a", "-F", "#{pane_pid}").split()
            below = [
                pid
                for pane in panes
                for pid in Path(f"/proc/{pane}/task/{pane}/children").read_text().split()
            ]
            tmux.call("kill-server")
            for pid in map(int, [*below, *panes]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
