"""What the agent keeps for pictures: what sessions held, when they were in use; and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lzy.agent.chronicle import Chronicle

if TYPE_CHECKING:
    from living import CommandLine, Program
    from service import Service

    Start = Callable[..., Program]


def readings(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.client.get("/v1/readings?session=calm")["readings"]
    return found


def test_timeline_of_a_life(
    start: Start, lzy: CommandLine, service: Service, tmp_path: Path
) -> None:
    """Attached, dozed, roused, hibernated, woken: each is a span; its memory falls and comes back.

    The next agent goes on with the same readings, and a damaged file of them hinders nothing.
    """
    program = start("heap").await_ready()
    service.begin().set()
    service.attach(program)
    service.wait_until(lambda: readings(service), "it was looked at")
    service.do("doze")
    first = readings(service)[0]["memory_bytes"]
    service.wait_until(
        lambda: readings(service)[-1]["memory_bytes"] < first / 2, "what it gave back was seen"
    )
    service.do("rouse")
    service.do("hibernate")
    program.await_end()
    service.do("wake")
    program.adopt(service.look()["pid"])
    picture = tmp_path / "calm.svg"
    document = lzy.succeed("timeline", "calm", "--svg", str(picture))
    (past,) = document["sessions"]
    states = [span["state"] for span in past["spans"]]
    order = [states.index(state) for state in ("dozing", "hibernated")]
    assert order == sorted(order)
    assert states[-1] in ("idle", "computing")
    assert all(
        before["ended_unix_s"] == after["began_unix_s"]
        for before, after in zip(past["spans"], past["spans"][1:], strict=False)
    )
    assert {"attached", "dozed", "roused", "hibernated", "woken"} <= {
        mark["kind"] for mark in past["marks"]
    }
    assert ElementTree.parse(picture).getroot() is not None
    shown = lzy.run("timeline").stdout.decode()
    assert "in the store" in shown
    assert lzy.fail("timeline", "nobody")["kind"] == "not_found"
    kept = len(readings(service))
    service.kill()
    service.begin()
    assert len(readings(service)) >= kept
    service.end()
    (service.home / "agent" / "readings.db").write_bytes(b"no database" * 1000)
    service.begin()
    service.wait_until(lambda: readings(service), "they begin anew")
    program.prove()


def test_a_strange_file_is_begun_anew(tmp_path: Path) -> None:
    """Whatever stands there, pictures are not worth an agent that does not start."""
    path = tmp_path / "readings.db"
    for content in (b"", b"SQLite format 3\0" + bytes(4096), b"x" * 10_000):
        path.write_bytes(content)
        chronicle = Chronicle(path)
        assert chronicle.readings(0) == []
        chronicle.close()
