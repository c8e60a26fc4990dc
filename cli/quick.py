"""The quick way to `lzy restore`: its plain forms are understood here, without click.

Importing click takes as long as making a process again does. Whatever is out of the ordinary
(help, completion, a mistake) is left to click, which has the say: a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

from .restoring import PID_NAMESPACES

FLAGS = {
    "--eager": "eager",
    "--accept-changed-files": "accept_changed_files",
    "--copy": "copy",
    "--reseed": "reseed",
    "--json": "as_json",
}
VALUES = {
    "--store": "store",
    "--pid-namespace": "pid_namespace",
    "--stdin": "stdin",
    "--stdout": "stdout",
    "--stderr": "stderr",
}


class RestoreArguments(TypedDict):
    """The arguments of `restoring.restore_image`."""

    image: str | None
    store: str | None
    eager: bool
    pid_namespace: str
    stdin: str | None
    stdout: str | None
    stderr: str | None
    accept_changed_files: bool
    copy: bool
    reseed: bool
    as_json: bool


def parse_restore(arguments: Sequence[str]) -> RestoreArguments | None:
    """What `lzy restore …` asks for, or None when click has to look at it."""
    if arguments[:1] != ["restore"] or "_LZY_COMPLETE" in os.environ:
        return None
    found: dict[str, str | bool] = {}
    words = iter(arguments[1:])
    for word in words:
        name, given, value = word.partition("=")
        if word in FLAGS:
            found[FLAGS[word]] = True
        elif name in VALUES:
            if not given:
                value = next(words, "-")
                if value.startswith("-"):
                    return None
            found[VALUES[name]] = value
        elif word.startswith("-") or "image" in found:
            return None
        else:
            found["image"] = word
    parsed = RestoreArguments(
        image=None,
        store=None,
        eager=False,
        pid_namespace="auto",
        stdin=None,
        stdout=None,
        stderr=None,
        accept_changed_files=False,
        copy=False,
        reseed=False,
        as_json=False,
    )
    parsed.update(found)  # type: ignore[typeddict-item]  # the tables above name its keys
    if parsed["reseed"] and not parsed["copy"]:
        return None
    if parsed["copy"] and parsed["pid_namespace"] == "host":
        return None
    return parsed if parsed["pid_namespace"] in PID_NAMESPACES else None
