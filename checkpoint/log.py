"""What the checkpoints of a session say of themselves: when, why, from which one, how large."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .errors import Damaged, NotFound
from .history import image_name, require_session, session_facts

if TYPE_CHECKING:
    from .store import Store


class Checkpoint(NamedTuple):
    """One image of a series, as `read_log` tells it: sizes in bytes, times in Unix seconds.

    `parent` is the checkpoint that it grew from, None for a first one; `why` is empty when the
    image does not say (it is older than sessions). `damage` is empty unless the image cannot be
    read; all else but its name is unknown then.
    """

    session: str
    number: int
    taken_unix_s: float = 0.0
    why: str = ""
    parent: str | None = None
    raw_bytes: int = 0
    stored_bytes: int = 0
    damage: str = ""

    @property
    def image(self) -> str:
        """The name of its image in the store."""
        return image_name(self.session, self.number)

    @property
    def name(self) -> str:
        """What a person calls it: always with its number."""
        return f"{self.session}@{self.number}"


def read_log(store: Store, session: str) -> list[Checkpoint]:
    """The checkpoints of `session`, newest first. Raises NotFound when it has none."""
    found = []
    for number in reversed(require_session(store, session)):
        image_file = image_name(session, number)
        try:
            with store.load_unchecked(image_file) as image:
                document = image.document
                facts = session_facts(document, image_file)
                taken = float(document.get("taken_unix_s") or image.header.created_unix_ns / 1e9)
                found.append(
                    Checkpoint(
                        session=session,
                        number=number,
                        taken_unix_s=taken,
                        why=str(facts.get("why") or ""),
                        parent=facts.get("parent"),
                        raw_bytes=image.raw_bytes,
                        stored_bytes=image.stored_bytes,
                    )
                )
        except NotFound:
            continue  # removed meanwhile
        except Damaged as error:
            found.append(Checkpoint(session, number, damage=error.message))
    return found


def ancestors(log: list[Checkpoint], number: int) -> list[Checkpoint]:
    """Checkpoint `number` and those of the same log that it grew from, newest first."""
    by_image = {checkpoint.image: checkpoint for checkpoint in log}
    found = []
    at = next((c for c in log if c.number == number), None)
    while at is not None:
        found.append(at)
        parent = by_image.pop(at.parent, None) if at.parent else None
        at = parent if parent and parent.number < at.number else None
    return found
