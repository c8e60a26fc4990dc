"""The world of a simulation: what things take that the rules do not decide, and which rules run."""

from __future__ import annotations

from typing import NamedTuple

from .facts import NEVER_S, Settings


class World(NamedTuple):
    """What things take that the rules do not decide upon, in seconds; `A`: assumed."""

    pause_s: float = 600.0
    """A: of pauses up to this long the user is taken to be at work; see `tally`."""
    hibernate_dozing_s: float = 0.3
    """A: what dozing has written need not be written again."""
    node_start_s: float = 40.0  # A
    linger_s: float = 600.0
    """A: an empty node is kept on for so long."""
    spare_nodes: int = 1
    """A: empty nodes of each kind without GPU that are always on, for who comes next."""
    kernel_start_s: float = 0.96
    """Measured: a new notebook kernel, docs/performance.md."""
    rerun_share: float = 0.25
    """A: of what a killed kernel has computed, what its user computes again."""


class Policy(NamedTuple):
    """A name, the rules' figures, and whether hibernating means killing, as elsewhere."""

    name: str
    settings: Settings
    kills: bool = False


def always_on() -> Policy:
    """A session holds its share from its start to its end."""
    never = Settings(gpu_back_after_s=NEVER_S, doze_after_s=NEVER_S, hibernate_after_s=NEVER_S,
                     adaptive=False)  # fmt: skip
    return Policy("always on", never)


def fixed_timeout(timeout_s: float = 3600.0) -> Policy:
    """What cullers do: a kernel idle for `timeout_s` is killed, and its variables with it."""
    settings = always_on().settings
    return Policy("idle timeout", settings._replace(hibernate_after_s=timeout_s), kills=True)
