"""What `lzy up --nodes` and `--listen` prepare: certificates, homes, stores, who is started."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..agent.client import is_trial
from .layout import count, paint
from .sizes import Size

if TYPE_CHECKING:
    from ..agent.client import Client
    from ..agent.identity import Identity

_MOST_NODES = 32
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class NodeList(click.ParamType["list[Identity]"]):
    """`small:1cpu:2G,gpu:2cpu:8G:1gpu` as nodes."""

    name = "NODES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Identity]:
        if isinstance(value, list):
            return value
        nodes = [self._read(text, param, ctx) for text in str(value).split(",") if text.strip()]
        names = [node.name for node in nodes]
        if not nodes or len(nodes) > _MOST_NODES or len(set(names)) != len(names):
            self.fail(f"give 1 to {_MOST_NODES} nodes of different names", param, ctx)
        return nodes

    def _read(
        self, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Identity:
        from ..agent.identity import Identity, check_node_name, memory_total_bytes
        from ..checkpoint.errors import LzyError

        name, *parts = text.strip().split(":")
        cpus, memory_bytes, gpus = float(os.cpu_count() or 1), memory_total_bytes(), 0
        labels: dict[str, str] = {}
        for part in parts:
            if found := re.fullmatch(r"(\d+(?:\.\d+)?)cpus?", part):
                cpus = float(found[1])
            elif found := re.fullmatch(r"(\d+)gpus?", part):
                gpus = int(found[1])
            elif "=" in part:
                labels |= dict([part.split("=", 1)])
            else:
                memory_bytes = Size().convert(part, param, ctx)
        try:
            check_node_name(name)
        except LzyError as error:
            self.fail(f"{error.message}; {error.remedy}", param, ctx)
        return Identity(name, cpus, memory_bytes, gpus, gpus > 0, labels)


class LinkSpeed(click.ParamType["dict[str, Any]"]):
    """`100mbit,20ms` as bits_per_s and delay_s."""

    name = "SPEED"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        speed: dict[str, Any] = {}
        for part in str(value).lower().split(","):
            if found := re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", part.strip()):
                speed["bits_per_s"] = float(found[1]) * _RATES[found[2]]
            elif found := re.fullmatch(r"(\d+(?:\.\d+)?)ms", part.strip()):
                speed["delay_s"] = float(found[1]) / 1000
            else:
                self.fail(f"{part!r} is no speed; write 1gbit, or 100mbit,20ms", param, ctx)
        return speed


def has_nodes(folder: Path, nodes: list[Identity]) -> bool:
    """Whether that home has these very nodes, in namespaces of this machine."""
    from ..agent.identity import read_identity
    from ..agent.trial import node_home, read_trial

    if not is_trial(folder) or read_trial(folder)["nodes"] != [node.name for node in nodes]:
        return False
    own = (read_identity(node_home(folder, node.name)) for node in nodes)
    bare = (was._replace(address="", migrator="") for was in own)
    return all(was == node for was, node in zip(bare, nodes, strict=True))


def prepare_trial(
    folder: Path,
    nodes: list[Identity],
    speed: dict[str, Any],
    own_stores: bool,
    settings: dict[str, float | None],
) -> None:
    """Make homes and certificates of nodes that are namespaces of this machine."""
    from ..agent import authority
    from ..agent.identity import write_identity
    from ..agent.network import FABRIC_ADDRESS, address_of, check_speed
    from ..agent.settings import Settings, check_settings
    from ..agent.state import State
    from ..agent.trial import node_home
    from ..checkpoint.store import Store
    from ..migrator.fleet import Member, write_members

    _refuse_mixing(folder)
    check_speed(speed)
    place = authority.fleet_folder(folder)
    authority.make_authority(place)
    authority.issue(place, place, authority.MIGRATOR)
    with Store.open(folder / "store", create=True) as store:
        secret = (store.path / "secret").read_bytes()
    members = []
    for number, node in enumerate(nodes):
        own = node_home(folder, node.name)
        for path in (own, own / "run", own / "agent"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        address = address_of(number)
        write_identity(own, node._replace(address=address, migrator=FABRIC_ADDRESS))
        authority.issue(place, authority.fleet_folder(own), authority.node_subject(node.name))
        _give_store(own / "store", folder / "store", secret, own_stores)
        if settings:
            state = State(own / "agent" / "state.db")
            state.set(check_settings(settings, frozenset(Settings._fields)))
            state.close()
        members.append(Member(node.name, address))
    trial = {"nodes": [node.name for node in nodes], "link": speed}
    (place / "trial.json").write_text(json.dumps(trial))
    write_members(folder, members)


def _refuse_mixing(folder: Path) -> None:
    """A home that looks after processes of the machine itself is no home for nodes to try."""
    if (folder / "agent" / "state.db").exists():
        from ..agent.state import State

        state = State(folder / "agent" / "state.db")
        try:
            if state.records():
                raise click.UsageError(
                    f"{folder} has sessions of its own; give the nodes another LZY_HOME."
                )
        finally:
            state.close()


def _give_store(own: Path, shared: Path, secret: bytes, own_stores: bool) -> None:
    if not own_stores:
        if own.is_dir() and not own.is_symlink():
            raise click.UsageError(f"{own} is a store of its own already: add --own-stores.")
        if not own.is_symlink():
            own.symlink_to(shared)
        return
    if own.is_symlink():
        raise click.UsageError(f"{own} is the shared store: leave --own-stores out.")
    own.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(own / "secret", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(secret)


def prepare_fleet(folder: Path, address: str) -> None:
    """Have the migrator of this home listen for other machines, and its agent, one port higher."""
    from ..agent import authority
    from ..agent.identity import read_identity, write_identity
    from ..agent.peers import split_address
    from ..migrator.fleet import Fleet, Member

    host, port = split_address(address)
    prepare_migrator(folder, address)
    own = read_identity(folder)._replace(address=f"{host}:{port + 1}", migrator=address)
    place = authority.fleet_folder(folder)
    write_identity(folder, own)
    node = folder / "node"
    authority.issue(place, node, authority.node_subject(own.name))
    Fleet(folder).add(Member(own.name, own.address))


def prepare_migrator(folder: Path, address: str) -> None:
    """Certificates of a migrator that other machines reach at `address`."""
    from ..agent import authority
    from ..agent.peers import split_address
    from ..migrator.fleet import write_members

    split_address(address)
    place = authority.fleet_folder(folder)
    authority.make_authority(place)
    authority.issue(place, place, authority.MIGRATOR)
    (place / "migrator.json").write_text(json.dumps({"address": address}))
    if not (place / "nodes.json").exists():
        write_members(folder, [])


def daemons_of(folder: Path) -> list[list[str]]:
    """The commands of the daemons that a home needs."""
    migrator = _module("lzy.migrator.service")
    if not is_trial(folder):
        return [_module("lzy.agent"), migrator]
    undo_drain(folder)
    names = json.loads((folder / "fleet" / "trial.json").read_bytes())["nodes"]
    nodes = [_module("lzy.agent.trial", "node", name) for name in names]
    return [_module("lzy.agent.trial", "fabric"), migrator, *nodes]


def _module(name: str, *words: str) -> list[str]:
    """The command that runs a module; -P: nothing is imported from the working directory."""
    return [sys.executable, "-P", "-m", name, *words]


def all_answer(client: Client, folder: Path) -> bool:
    """Whether every node that was started here answers."""
    if not is_trial(folder):
        return True
    return all(node["reachable"] for node in client.get("/v1/nodes", timeout_s=10)["nodes"])


def _drain_all(client: Client) -> None:
    """Have no session wake any more, whoever connects to it, until the nodes are up again."""
    from ..checkpoint.home import home

    nodes = client.get("/v1/nodes", timeout_s=30)["nodes"]
    ours = [n["name"] for n in nodes if n["reachable"] and not n["draining"]]
    (home() / "fleet" / "stopping.json").write_text(json.dumps(ours))
    for name in ours:
        client.post(f"/v1/nodes/{name}/drain", {"draining": True}, timeout_s=30)


def undo_drain(folder: Path, client: Client | None = None) -> None:
    """Have the nodes that `lzy down` drained take sessions again: through `client`, or before."""
    from ..agent.state import State

    path = folder / "fleet" / "stopping.json"
    if not path.exists():
        return
    for name in json.loads(path.read_bytes()):
        if client is not None:
            client.post(f"/v1/nodes/{name}/drain", {"draining": False}, timeout_s=30)
            continue
        state = State(folder / "nodes" / name / "agent" / "state.db")
        state.set({"draining": 0.0})
        state.close()
    path.unlink()


def hibernate_all(sessions: list[dict[str, Any]], abandon: bool) -> list[dict[str, Any]]:
    """Hibernate what runs, for its node goes; the sessions as they are then."""
    from ..agent.client import Client
    from ..checkpoint.errors import Busy, LzyError
    from ..checkpoint.home import home

    client = Client()
    _drain_all(client)
    stay: dict[str, str] = {}
    for session in sessions:
        if session["pid"] is None:
            continue
        try:
            client.post(client.session(session["name"], "hibernate"), {})
        except LzyError as error:
            stay[session["name"]] = error.message
    for name, words in stay.items():
        click.echo(f"lzy: {paint(name, 'bold')} cannot be hibernated: {words}", err=True)
    if stay and not abandon:
        undo_drain(home(), client)
        raise Busy(
            f"{count(len(stay), 'session')} would end with the nodes: {', '.join(stay)}",
            remedy="lzy down --abandon ends them",
        )
    return list(client.get("/v1/sessions", timeout_s=30)["sessions"])
