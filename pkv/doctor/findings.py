"""What a check found."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What a check returns; `remedy` says what to do unless all is well."""

    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """An outcome with the check that it is of; the code stays what it is from version to version."""

    code: str
    check: str
    state: State
    found: str
    remedy: str


def in_words(findings: Sequence[Finding]) -> str:
    """A line a finding, its remedy below it, and how many there are that matter."""
    lines = []
    for each in findings:
        lines.append(f"{each.code} {each.state:<7} {each.check}: {each.found}")
        if each.remedy:
            lines.append(textwrap.indent(each.remedy, " " * 16 + "-> "))
    failed = sum(each.state == "fail" for each in findings)
    warned = sum(each.state == "warn" for each in findings)
    lines.append(f"{len(findings)} checks: {failed} failed, {warned} to look at")
    return "\n".join(lines)
