"""What has become of a session, found out from processes and images, whoever was killed before.

The record may be older than the truth: an operation was killed half-way, the process ended, or
somebody used `lzy dump` and `lzy restore` by hand. Three questions settle it, in this order. Does
a process of the session live (the one recorded, or one that a restore has written down since)?
Then it runs, and is never made a second time. Was its newest image taken to end it? Then it
hibernates. Else it has ended, and the newest image that can be read is kept as its last good one.

*Precondition*: nobody works on the session; who repairs holds its lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any, Final, NamedTuple

from ..checkpoint import proc
from ..checkpoint.doze import is_dozing
from ..checkpoint.errors import LzyError
from ..checkpoint.history import ASKED, image_name, list_numbers, session_facts
from ..checkpoint.lineage import Lineage, find_lineage, lineage_path
from ..checkpoint.store import Store
from .processes import find_living, is_traced
from .state import (
    DOZING,
    ENDED,
    FAILED,
    HIBERNATED,
    LIVING,
    RUNNING,
    WAKING,
    Record,
)

TO_END: Final = frozenset({"hibernate", "idle", "pressure", "migrate"})
"""Why an image was taken, where it was to be the end of the process."""

_LETS_GO_S = 5.0
_DIES_WITHIN_S = 0.25


class Finding(NamedTuple):
    """What the record is to say, and the event that tells of it; no kind: nothing has changed."""

    changes: dict[str, Any]
    kind: str
    words: str


def find_out(store: Store, record: Record, *, watched: bool, status: int | None = None) -> Finding:
    """What is true of the session now.

    `watched`: the agent was there all the time, so that an end without a status is no mystery;
    `status`: how the process ended, as waitpid(2) says it, if that is known.
    """
    left_by_itself = os.path.exists(lineage_path(record.pid))  # a dump that ends it removes that
    numbers = list_numbers(store, record.name)
    living = find_living(store, record)
    if living and (record.intent or not watched):
        living = _await_settled(store, record)
    if living:
        return _found_running(store, record, living, numbers)
    if record.state in (HIBERNATED, WAKING):
        changes: dict[str, Any] = {"state": HIBERNATED, "intent": ""}
        if record.state == WAKING:
            return Finding(changes, "repaired", "its wake did not finish; it hibernates")
        return Finding({"intent": ""} if record.intent else {}, "", "")
    if record.state not in LIVING:
        return Finding({"intent": ""} if record.intent else {}, "", "")
    newest = numbers[-1] if numbers else 0
    if newest > record.number and _was_to_end(store, record.name, newest, left_by_itself):
        changes = {"state": HIBERNATED, "intent": "", "exit_status": None}
        changes |= _describe_image(store, record.name, numbers)
        return Finding(changes, "hibernated", f"hibernates in {changes['image']}")
    return _found_ended(store, record, numbers, watched, status)


def _await_settled(store: Store, record: Record) -> Lineage | Record | None:
    """The living process, once it is certain that it goes on living.

    A restore that was killed takes the unfinished process with it, a moment after it let go of
    everything else.
    """
    deadline = time.monotonic() + _LETS_GO_S
    while (living := find_living(store, record)) and time.monotonic() < deadline:
        if not is_traced(living.pid):
            break
        time.sleep(0.01)
    deadline = time.monotonic() + _DIES_WITHIN_S
    while living and record.state == WAKING and time.monotonic() < deadline:
        time.sleep(0.02)
        living = find_living(store, record)
    return living


def _found_running(
    store: Store, record: Record, living: Lineage | Record, numbers: list[int]
) -> Finding:
    same = living.pid == record.pid and living.start_time == record.start_time
    dozed = record.state == DOZING or record.intent == "doze"
    state = DOZING if dozed and is_dozing(living.pid) else RUNNING
    changes: dict[str, Any] = {"intent": "", "state": state, "failure": ""}
    own = find_lineage(living.pid, store)
    if own and own.session == record.name and own.image != record.image:
        changes |= _describe_image(store, record.name, numbers, own.image)
    elif numbers:
        changes["number"] = numbers[-1]
    if not same:
        changes |= {
            "pid": living.pid,
            "start_time": living.start_time,
            "boot_id": living.boot_id,
            "epoch": record.epoch + 1,
            "woken_unix_s": time.time(),
            "exit_status": None,
        }
        return Finding(changes, "woken", f"runs as process {living.pid}")
    if record.intent:
        words = f"its {record.intent} did not finish; process {living.pid} runs on"
        return Finding(changes, "repaired", words)
    return Finding({k: v for k, v in changes.items() if getattr(record, k) != v}, "", "")


def _was_to_end(store: Store, session: str, number: int, left_by_itself: bool) -> bool:
    """Whether checkpoint `number` was taken to end the process."""
    image = image_name(session, number)
    with contextlib.suppress(LzyError), store.load_unchecked(image) as opened:
        why = session_facts(opened.document, image).get("why")
        return why in TO_END or (why == ASKED and not left_by_itself)
    return False


def _found_ended(
    store: Store, record: Record, numbers: list[int], watched: bool, status: int | None
) -> Finding:
    changes: dict[str, Any] = {"intent": "", "exit_status": status}
    changes |= _describe_image(store, record.name, numbers)
    if status is not None and not os.WIFSIGNALED(status):
        code = os.waitstatus_to_exitcode(status)
        changes["state"] = FAILED if code else ENDED
        words = f"process {record.pid} ended with exit status {code}"
    elif status is not None:
        changes["state"] = FAILED
        name = _name_signal(os.WTERMSIG(status))
        words = f"process {record.pid} was ended by signal {os.WTERMSIG(status)} ({name})"
    elif watched:
        changes["state"] = ENDED
        words = f"process {record.pid} has ended"
    else:
        changes["state"] = FAILED
        machine = record.boot_id != proc.boot_id()
        words = "it ran when the machine went down" if machine else "it ended while nobody watched"
    image = changes.get("image")
    words += f"; {image} is its last image" if image else "; it has no image"
    if changes["state"] == FAILED:
        changes["failure"] = words
    return Finding(changes, str(changes["state"]), words)


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "no name"


def _describe_image(
    store: Store, session: str, numbers: list[int], wanted: str = ""
) -> dict[str, Any]:
    """What a record says of `wanted`, or of the newest image that is whole."""
    for image in [wanted] if wanted else [image_name(session, n) for n in reversed(numbers)]:
        with contextlib.suppress(LzyError), store.load(image) as opened:
            newest = numbers[-1] if numbers else 0
            return {"image": image, "image_bytes": opened.raw_bytes, "number": newest}
    return {"number": numbers[-1]} if numbers else {}
