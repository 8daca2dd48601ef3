"""The construct as it should look: its one exact layout, and how near a trace comes to it."""

from __future__ import annotations

from collections.abc import Mapping

from pkv.competition.tags import ORDER, TAGS, scan
from pkv.records import BLOCKS, FIGHTERS, Trace

__all__ = ["TAGS", "compose", "is_exact_layout", "tags_in_order"]


def compose(fighters: Mapping[str, str], result: str, winner: str, answer: str) -> str:
    """A competition in the one exact layout; every text is stripped. Raises KeyError when a fighter is missing."""
    fights = "\n".join(f"<{name}>\n{fighters[name].strip()}\n</{name}>" for name in FIGHTERS)
    judge = f"<result>\n{result.strip()}\n<winner>{winner.strip()}</winner>\n</result>"
    return f"<competition>\n{fights}\n{judge}\n</competition>\n{answer.strip()}"


def tags_in_order(trace: Trace) -> bool:
    """Whether all twelve tags stand exactly once, in the right order and nesting, whatever the layout."""
    return tuple(tag.form for tag in scan(trace.text) if not tag.damage) == ORDER


def is_exact_layout(trace: Trace) -> bool:
    """Whether a trace stands exactly as `compose` writes it: no empty block, no damaged tag, nothing before or between.

    Blanks at the very end are let pass: a stop token may come after them.
    """
    if any(error.code != "truncated" for error in trace.errors) or not tags_in_order(trace):
        return False
    texts = {name: (trace.block_text(name) or "").strip() for name in BLOCKS}
    result = (trace.block_text("result") or "").partition("<winner>")[0].strip()
    if not all(texts.values()) or not result:
        return False
    return trace.text.rstrip() == compose(texts, result, texts["winner"], texts["answer"])
