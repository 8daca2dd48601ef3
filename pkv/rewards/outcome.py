"""What came out: a winner by name, and a right answer without a tag in it."""

from __future__ import annotations

from pkv.competition import tag_leaks
from pkv.records import FIGHTERS, Trace
from pkv.rewards.context import Context
from pkv.rewards.lexicon import words


def winner(context: Context) -> float:
    """1.0 for exactly one of the three words, 0.5 for one name with other text, 0 for none or for more than one."""
    name = winner_name(context.trace)
    if name is None:
        return 0.0
    said = (context.trace.block_text("winner") or "").strip()
    return 1.0 if said.isascii() and said.lower() == name else 0.5


def winner_name(trace: Trace) -> str | None:
    """The one fighter that the winner's tag names; a judge that names two has named none."""
    named = {word for word in words(trace.block_text("winner") or "") if word in FIGHTERS}
    return named.pop() if len(named) == 1 else None


def correctness(context: Context) -> float:
    """1.0 when the final answer is right, 0 when it is wrong or absent, -1.0 when a tag leaks into it.

    A response without `</competition>` has no final answer, so that stopping early never pays. Raises VerifyError.
    """
    if tag_leaks(context.text("answer")):
        return -1.0
    return float(context.is_right("answer"))


def fighter_correctness(name: str, context: Context) -> float:
    """1.0 when the answer that a fighter's own block states is right, else 0. Raises VerifyError."""
    return float(context.is_right(name))
