"""Reads the final answer out of a text: what was marked as the answer, never a guess. Linear time.

First an explicit marker (a line `Answer: X`, a sentence `Final answer: X.`) or a `\\boxed{X}`, whichever stands last;
then prose (see prose.py): the phrase that states the answer, then an only number. Of several the last counts, so that a
correction is not punished and hedging gains nothing. Anything else is a coded failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pkv.mathcheck.numbers import read_number
from pkv.mathcheck.prose import (
    SIGNS_FOR_ANSWER,
    TAKEN_BACK,
    WORDS_FOR_ANSWER,
    AmbiguousError,
    find_candidates,
    first_sentence,
    read_only_number,
    read_phrase,
    trim,
)
from pkv.records import Span

Code = Literal["marker", "boxed", "phrase", "only_number", "ambiguous", "none"]

_MARKER = re.compile(
    r"(?:^[ \t>#*_-]{0,12}(?:the[ \t]{1,4})?(?:(?:final|correct)[ \t]{1,4})?"
    r"|(?P<sentence>(?<=[.!?$][ \t])[*_]{0,3}final[ \t]))"
    rf"(?:{WORDS_FOR_ANSWER}|{SIGNS_FOR_ANSWER})(?:[ \t]{{1,4}}is)?[*_ \t]{{0,6}}[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_BRACE = re.compile(r"(?P<box>\\boxed\s{0,4}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_DISPLAY = re.compile(r"[ \t*_]{0,8}(\$\$|\\\[)")
_DISPLAY_LENGTH = 1000  # characters of a displayed formula
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_VERB = re.compile(r"\b(?:is|are|was|be|equals)\b|^(?:they|you|we|it|there|i|he|she)\b", re.IGNORECASE)
# Said beside the value, but no other one: "24 candles (4 per hive)".
_REMARK = re.compile(r"\s?\((?![^()]*\b(?:or|not|maybe|perhaps)\b)(?=[^()]*[A-Za-z])[^()]{1,60}\)$", re.IGNORECASE)
_PROSE_WORDS = 4  # a marked value with a verb or as many words, and not a number with its unit, is a sentence


@dataclass(frozen=True)
class Extraction:
    """The answer that a text states and how; value and span (characters) are None for "ambiguous" and "none"."""

    value: str | None
    code: Code
    span: Span | None = None


def extract_answer(text: str) -> Extraction:
    """The final answer that a text states, with how it was found and where."""
    marked, boxed = _last_marker(text), _last_box(text)
    if boxed and (marked is None or boxed.start >= marked.start):
        return Extraction(text[boxed.start : boxed.stop], "boxed", boxed)
    if marked:
        return _read_marked(text, marked)
    return _read_prose(text, Span(0, len(text)))


def _found(text: str, span: Span, code: Code) -> Extraction:
    span = trim(text, span)
    return Extraction(text[span.start : span.stop], code, span)


def _last_marker(text: str) -> Span | None:
    """The value of the last `Answer:` line or sentence; a marker that stands alone marks the next line with text."""
    for match in reversed(list(_MARKER.finditer(text))):
        span = _rest_of_line(text, match.end())
        span = trim(text, first_sentence(text, span) if match["sentence"] else span)
        if not span.size:
            following = re.compile(r"\S").search(text, match.end())
            if following:
                span = trim(text, _rest_of_line(text, following.start()))
        if span.size:
            return span
    return None


def _rest_of_line(text: str, at: int) -> Span:
    """From a character to the end of its line, or of the displayed formula that opens there."""
    opening = _DISPLAY.match(text, at)
    if opening:
        close = "$$" if opening[1] == "$$" else "\\]"
        end = text.find(close, opening.end(), opening.end() + _DISPLAY_LENGTH)
        if end >= 0:
            return Span(at, end + len(close))
    end = text.find("\n", at)
    return Span(at, len(text) if end < 0 else end)


def _last_box(text: str) -> Span | None:
    """The inside of the last box that was opened and closed again, braces matched, escaped braces left alone."""
    stack: list[int | None] = []  # where a box's inside starts; None for any other brace
    last: Span | None = None
    for match in _BRACE.finditer(text):
        if match["box"]:
            stack.append(match.end())
        elif match["open"]:
            stack.append(None)
        elif match["close"] and stack:
            start = stack.pop()
            inside = None if start is None else trim(text, Span(start, match.start()), ".,;")
            if inside and inside.size and (last is None or inside.start > last.start):
                last = inside
    return last


def _read_marked(text: str, span: Span) -> Extraction:
    """A marked value as it stands; a marked sentence is read like prose, and is the value itself if it states none.

    But what is marked and closes with `= 24` is an equation chain, in a sentence as without one.
    """
    value = text[span.start : span.stop]
    remark = _REMARK.search(value)
    if remark and not read_number(value) and read_number(value[: remark.start()]):
        span = Span(span.start, span.start + remark.start())
        return Extraction(value[: remark.start()], "marker", span)
    is_formula = text.endswith(("$", "\\(", "\\["), 0, span.start)  # all of it, or `trim` would have left them there
    is_sentence = bool(_VERB.search(value)) or len(_WORD.findall(value)) >= _PROSE_WORDS
    if TAKEN_BACK.search(value):
        return Extraction(None, "ambiguous")
    if is_sentence and not is_formula and read_number(value) is None:
        inside = _read_prose(text, span, closing=False)
        if inside.code == "ambiguous":
            return inside
        if inside.value is not None:
            return Extraction(inside.value, "marker", inside.span)
    return Extraction(value, "marker", span)


def _read_prose(text: str, span: Span, closing: bool = True) -> Extraction:
    candidates = list(find_candidates(text, span))
    try:
        stated = read_phrase(text, span, candidates, closing)
        if stated:
            return _found(text, stated, "phrase")
        only = read_only_number(text, candidates)
        return _found(text, only, "only_number") if only else Extraction(None, "none")
    except AmbiguousError:
        return Extraction(None, "ambiguous")
