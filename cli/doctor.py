"""`lzy doctor`: what this machine can and cannot do, and what to do about it."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING

import click

from .arguments import json_option, store_option
from .layout import paint, say, say_json
from .stores import store_path

if TYPE_CHECKING:
    from ..checkpoint.doctor import Finding

_MARKS = {"works": ("✓", "green"), "degraded": ("!", "yellow"), "missing": ("✗", "red")}


@click.command(
    epilog="""\b
    Examples:
      lzy doctor
      lzy doctor --json | jq '.checks[] | select(.verdict != "works")'
    """
)
@store_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, store: str | None, as_json: bool) -> None:
    """Tell what this machine can do, and what to do about the rest.

    Each thing is tried, not guessed from the kernel's version. Exit status 0 when dump and restore
    would work here, else 1.
    """
    from ..checkpoint.doctor import examine, is_ready

    findings = examine(store_path(store))
    ready = is_ready(findings)
    if as_json:
        checks = [
            {
                "name": finding.name,
                "verdict": finding.verdict,
                "needed": finding.needed,
                "words": finding.words,
                "remedy": finding.remedy,
                "details": finding.details,
            }
            for finding in findings
        ]
        say_json({"ready": ready, "checks": checks})
    else:
        say(describe(findings, ready))
    ctx.exit(0 if ready else 1)


def describe(findings: list[Finding], ready: bool) -> list[str]:
    """One line each, what to do below it, and the sum of it last."""
    width = max(len(finding.name) for finding in findings)
    columns = os.get_terminal_size().columns if sys.stdout.isatty() else 1000
    lines = []
    for finding in findings:
        sign, colour = _MARKS[finding.verdict]
        if finding.verdict == "missing" and not finding.needed:
            sign, colour = "–", "dim"
        margin = " " * (width + 4)
        words = textwrap.wrap(finding.words, max(columns - len(margin), 30))
        lines.append(f"{paint(sign, colour)} {finding.name.ljust(width)}  {words[0]}")
        lines += [margin + line for line in words[1:]]
        if finding.remedy:
            remedy = textwrap.wrap(f"→ {finding.remedy}", max(columns - len(margin), 30))
            lines += [margin + paint(line, "dim") for line in remedy]
    degraded = sum(finding.verdict == "degraded" for finding in findings)
    if not ready:
        verdict = paint(
            "dump and restore will not work here until what is marked ✗ is there", "red"
        )
    elif degraded:
        verdict = paint("dump and restore work here", "green") + ", with limits where marked !"
    else:
        verdict = paint("dump and restore work here", "green")
    return [*lines, "", verdict]
