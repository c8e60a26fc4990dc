"""What programs send to a terminal, taken apart: text, control characters, escape sequences."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

_LONGEST_SEQUENCE = 1 << 16
_TOKEN = re.compile(
    r"(?P<text>[^\x00-\x1f\x7f-\x9f]+)"
    r"|\x1b\[(?P<parameters>[0-?]*)(?P<between>[ -/]*)(?P<final>[@-~])"
    r"|\x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)"
    r"|\x1b[PX^_][^\x1b]*(?:\x1b[^\x1b\\][^\x1b]*)*\x1b\\"
    r"|\x1b(?P<set>[ -/]+)(?P<which>[0-~])"
    r"|\x1b(?P<escape>[0-OQ-WYZ\\`-~])"
    r"|(?P<control>[\x00-\x1a\x1c-\x1f\x7f-\x9f])"
)
_UNFINISHED = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[PX^_].*|[ -/]*)?\Z", re.DOTALL
)
_SKIMMED = re.compile(rb"\x1b\[[?>][0-9;]*[hlmu]|\x1bc|\x1b\[!p|\x1b[=>]")
QUERY = re.compile(
    rb"\x1b\[[>=?]?[0-9;]*[cn]|\x1b\[>[0-9]*q|\x1b\[\??[0-9;]*\$p|\x1b\[\?u"
    rb"|\x1bP[+$]q.*?\x1b\\|\x1b\][0-9;]*;\?(?:\x07|\x1b\\)"
)
"""What a terminal answers; only one of several may."""


def skim(output: bytes) -> bytes:
    """Of output that nobody will see, what changes the modes of the terminal."""
    return b"".join(_SKIMMED.findall(output))


class Tokens:
    """Takes output apart, however it is cut into pieces."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    @property
    def unfinished(self) -> bytes:
        """The beginning of a sequence or character whose end has not come yet."""
        return self._rest.encode() + self._decoder.getstate()[0]

    def feed(self, output: bytes) -> Iterator[re.Match[str]]:
        """Each text, sequence and control character that is whole by now; `lastgroup` says which.

        text; final (with parameters and between): CSI; osc; which (with set); escape; control;
        None: a string that means nothing to a screen.
        """
        text = self._rest + self._decoder.decode(output)
        self._rest = ""
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                if _UNFINISHED.match(text, at) and len(text) - at < _LONGEST_SEQUENCE:
                    self._rest = text[at:]
                    return
                at += 1
                continue
            at = found.end()
            yield found
