"""`lzy agent` and `lzy migrator`: one daemon of a fleet, in the foreground."""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit

import click

from .sizes import Size


@click.command(
    epilog="""\b
    Examples:
      lzy agent --join https://10.0.0.5:7433/#… --listen 10.0.0.6:7434
      lzy agent                             again, once it has joined
    """
)
@click.option("--join", "invitation", metavar="URL", help="What lzy nodes --invite printed.")
@click.option("--name", help="What this node is called.  [default: the host's name]")
@click.option("--listen", metavar="HOST:PORT", help="Where other nodes reach this one.")
@click.option("--cpus", type=click.FloatRange(0.01, 4096), help="What it offers.")
@click.option("--memory", type=Size(), help="What it offers.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--price", type=click.FloatRange(0), help="What it costs by the hour.")
def agent(
    invitation: str | None,
    name: str | None,
    listen: str | None,
    cpus: float | None,
    memory: int | None,
    labels: tuple[str, ...],
    price: float | None,
) -> None:
    """Be a node of a fleet whose migrator is elsewhere, until SIGTERM."""
    from ..agent.authority import is_member
    from ..agent.identity import check_node_name, of_machine, read_identity, write_identity
    from ..checkpoint.home import home

    folder = home()
    if not invitation and not is_member(folder):
        raise click.UsageError("This node is in no fleet yet: give --join URL.")
    for path in (folder, folder / "run", folder / "agent"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = read_identity(folder) if is_member(folder) else of_machine()
    own = own._replace(
        name=check_node_name(name or own.name),
        address=listen or own.address,
        cpus=cpus or own.cpus,
        memory_bytes=memory or own.memory_bytes,
        labels={**own.labels, **dict(label.split("=", 1) for label in labels if "=" in label)},
        price_per_hour=own.price_per_hour if price is None else price,
    )
    if not own.address:
        raise click.UsageError("Say where other nodes reach this one: --listen HOST:PORT.")
    if invitation:
        from ..migrator.join import join

        join(folder, invitation, own.name, own.address)
        own = own._replace(migrator=urlsplit(invitation).netloc)
    write_identity(folder, own)
    click.echo(f"node {own.name} at {own.address}", err=True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lzy.agent"])


@click.command(
    epilog="""\b
    Examples:
      lzy migrator --listen 10.0.0.5:7433
    """
)
@click.option("--listen", metavar="HOST:PORT", help="Where machines join, and nodes are led from.")
def migrator(listen: str | None) -> None:
    """Run the migrator of a fleet alone, until SIGTERM: no sessions live on this machine."""
    from ..checkpoint.home import home
    from ..migrator.service import migrator_address
    from .trial import prepare_migrator

    folder = home()
    if not (address := listen or migrator_address(folder)):
        raise click.UsageError("Say where machines can join: --listen HOST:PORT.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    prepare_migrator(folder, address)
    click.echo(f"the migrator listens at {address}; lzy nodes --invite invites", err=True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lzy.migrator.service"])
