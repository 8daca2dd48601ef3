"""The one door to math-verify. For VerifyPool's processes only: it can hang, and its own limits use signals."""

from __future__ import annotations

import logging


def same(gold: str, answer: str) -> bool:
    """Whether math-verify 0.9.0 finds two LaTeX texts equal; an answer that it cannot read is wrong. Raises ValueError.

    Only the LaTeX grammar is used, for both: the other one hands its input to sympy's parser, which runs code in it.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    grammar = [LatexExtractionConfig(boxed_match_priority=-1)]
    gold_read = parse(f"${gold}$", grammar, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    if not gold_read:
        raise ValueError(f"the gold answer cannot be read: {gold!r}")
    answer_read = parse(f"${answer}$", grammar, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    if not answer_read:
        return False
    return verify(gold_read, answer_read, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
