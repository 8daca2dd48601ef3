"""A rollout's text taken apart: one scan for tags, then a state machine over them. Never raises on any text.

What the parser says is wrong (`TraceError.code`):

missing     a tag that stands nowhere
unclosed    an opening tag whose closing tag stands nowhere
duplicate   a tag that stands more than once
misordered  a tag whose first appearance is not in its place
nested      a block that opens inside another one
attribute   a tag with something behind its name; it does not count as a tag
fenced      a tag in code; it does not count as a tag
disguised   an escaped, case-varied, spaced out or look-alike tag; it does not count as a tag
truncated   the rollout ended at its token limit
forced      a tag that the engine set, because a fighter's budget was spent
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkv.competition.tags import ORDER, TAGS, Tag, has_tag, scan
from pkv.records import OWNERS, Block, Segment, Span, Trace, TraceError

_END = "</competition>"
_WORDS = re.compile(r"\s*(?:\d+|[^\W\d]+|[^\w\s])|\s+")


@dataclass(frozen=True)
class TagReport:
    """How the twelve tags stand.

    placed: the tags, such as "</pirate>", whose first appearance is in its right place. duplicates: appearances beyond
    a tag's first. missing: how many of the twelve stand nowhere.
    """

    placed: frozenset[str]
    duplicates: int
    missing: int


def parse(
    text: str, offsets: np.ndarray | None = None, truncated: bool = False, forced: np.ndarray | None = None
) -> Trace:
    """Take a rollout's text apart into blocks, segments and coded errors.

    offsets: int [T+1], the character where each token starts, then len(text); None: `split_tokens(text)`.
    forced: bool [T], tokens that are none of the policy's; a tag made of such is an error, "forced".
    A block is found where its opening tag is followed, as the next tag, by its closing one (in `result` the winner's
    tags may stand between); the first such pair counts. An unclosed block is no block, but its text has its owner.
    Blanks between tags, and damaged tags before the answer, are owned by "tags": they are the structure's to pay for.
    Raises ValueError when the offsets don't fit the text.
    """
    offsets = split_tokens(text) if offsets is None else np.asarray(offsets)
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(text):
        raise ValueError(f"offsets of shape {offsets.shape} do not run from 0 to the text's length, {len(text)}")
    found = scan(text)
    tags = [tag for tag in found if not tag.damage]
    placed = _placed(tags)
    end = next((i for i, tag in enumerate(tags) if tag.form == _END), len(tags)) if _END in placed else len(tags)
    pairs = _pair(tags[:end])
    pieces = _cut(text, found, _owners_after(tags, pairs, end))
    spans, owners = _assign_tokens(pieces, offsets)
    segments = tuple(
        Segment(owner, Span(start, stop), tokens) for (start, stop, owner), tokens in zip(pieces, spans, strict=True)
    )
    tokens_at = {start: tokens for (start, _, _), tokens in zip(pieces, spans, strict=True)}
    blocks = {}
    for name in TAGS[1:]:
        if name in pairs:
            first, last = (tags[i].chars for i in pairs[name])
            chars = Span(first.stop, last.start)
            blocks[name] = Block(name, chars, Span(tokens_at[first.start].stop, tokens_at[last.start].start))
    if end < len(tags):
        close = tags[end].chars
        tokens = Span(tokens_at[close.start].stop, len(offsets) - 1)
        blocks["answer"] = Block("answer", Span(close.stop, len(text)), tokens)
    errors = _errors(text, found, tags, placed, truncated)
    if forced is not None and forced.any():
        errors = tuple(sorted([*errors, *_forced(tags, offsets, forced)], key=_by_place))
    return Trace(text, blocks, segments, owners, errors, truncated)


def split_tokens(text: str) -> np.ndarray:
    """Offsets of words, numbers and single punctuation marks, int32 [T+1]; blanks go with what follows them.

    It stands in for a tokenizer where there is none.
    """
    ends = np.cumsum(np.fromiter(map(len, _WORDS.findall(text)), np.int32), dtype=np.int32)
    return np.concatenate([np.zeros(1, np.int32), ends])


def trace_tags(text: str) -> tuple[Tag, ...]:
    """The tags that count, from left to right."""
    return tuple(tag for tag in scan(text) if not tag.damage)


def tag_leaks(text: str) -> bool:
    """Whether any tag of the construct stands in a piece of text, in any disguise."""
    return has_tag(text)


def tag_report(text: str) -> TagReport:
    """How the twelve tags stand in a text: what the structure reward pays for."""
    tags = trace_tags(text)
    distinct = len({(tag.name, tag.closing) for tag in tags})
    return TagReport(_placed(tags), len(tags) - distinct, len(ORDER) - distinct)


def _first_appearances(tags: Sequence[Tag]) -> dict[str, int]:
    """The place in `tags` of each tag's first appearance, from left to right."""
    first: dict[str, int] = {}
    for i, tag in enumerate(tags):
        first.setdefault(tag.form, i)
        if len(first) == len(ORDER):
            break
    return first


def _placed(tags: Sequence[Tag]) -> frozenset[str]:
    """The largest set of first appearances that stand in the right order, so that one stray tag costs only itself."""
    forms = list(_first_appearances(tags))
    chains: list[list[str]] = []
    for form in forms:
        before = [chain for chain in chains if ORDER.index(chain[-1]) < ORDER.index(form)]
        chains.append([*max(before, key=len, default=[]), form])
    return frozenset(max(chains, key=len, default=[]))


def _pair(tags: Sequence[Tag]) -> dict[str, tuple[int, int]]:
    """For each block that is found, the places of its opening and closing tag."""
    pairs: dict[str, tuple[int, int]] = {}
    for i, tag in enumerate(tags):
        if tag.closing or tag.name == "competition" or tag.name in pairs:
            continue
        j = i + 1
        while tag.name == "result" and j < len(tags) and tags[j].name == "winner":
            j += 1
        if j < len(tags) and tags[j].closing and tags[j].name == tag.name:
            pairs[tag.name] = (i, j)
    return pairs


def _owners_after(tags: Sequence[Tag], pairs: Mapping[str, tuple[int, int]], end: int) -> list[str]:
    """The owner of the text behind each tag, up to the next one."""
    homes = _first_appearances(tags)
    owners = []
    in_result = False
    for i, tag in enumerate(tags):
        home = pairs[tag.name][0] if tag.name in pairs else homes.get(f"<{tag.name}>")
        if i >= end:
            owner = "answer"
        elif tag.name == "competition":
            owner = "outside"
        elif not tag.closing and i == home:
            owner = tag.name
        else:
            owner = "result" if in_result and tag.name == "winner" else "outside"
        in_result = owner == "result" or (in_result and tag.name == "winner")
        owners.append(owner)
    return owners


def _cut(text: str, found: Sequence[Tag], owners_after: Sequence[str]) -> list[tuple[int, int, str]]:
    """(start, stop, owner) pieces that tile the text; none is empty."""
    pieces = []
    place, owner, real = 0, "outside", iter(owners_after)

    def add_text(stop: int) -> None:
        if place < stop:
            blank = owner == "outside" and text[place:stop].isspace()
            pieces.append((place, stop, "tags" if blank else owner))

    for tag in found:
        # A disguised tag in the answer is the answer's own leak.
        if not (tag.damage and owner == "answer"):
            add_text(tag.chars.start)
            pieces.append((*tag.chars, "tags"))
            place = tag.chars.stop
        if not tag.damage:
            owner = next(real)
    add_text(len(text))
    return pieces


def _assign_tokens(pieces: Sequence[tuple[int, int, str]], offsets: np.ndarray) -> tuple[list[Span], np.ndarray]:
    """Each piece's token span (they tile the tokens), and each token's owner, int8 [T].

    A token belongs to the piece where it starts, or to the first tag that it touches. One without characters (a stop
    token, half a character) belongs to the piece where it stands, at the end to the last one.
    """
    tokens, count = len(offsets) - 1, len(pieces)
    if not count:
        return [], np.zeros(tokens, np.int8)
    starts = np.array([start for start, _, _ in pieces])
    owners = np.array([OWNERS.index(owner) for _, _, owner in pieces], np.int8)
    next_tag = np.where(owners == OWNERS.index("tags"), np.arange(count), count)
    next_tag = np.minimum.accumulate(next_tag[::-1])[::-1]
    first = np.searchsorted(starts, offsets[:-1], side="right") - 1
    last = np.searchsorted(starts, np.maximum(offsets[1:] - 1, offsets[:-1]), side="right") - 1
    piece = np.where(next_tag[first] <= last, next_tag[first], first)
    lefts = np.searchsorted(piece, np.arange(count), side="left").tolist()
    rights = np.searchsorted(piece, np.arange(count), side="right").tolist()
    return [Span(left, right) for left, right in zip(lefts, rights, strict=True)], owners[piece]


def _errors(
    text: str, found: Sequence[Tag], tags: Sequence[Tag], placed: frozenset[str], truncated: bool
) -> tuple[TraceError, ...]:
    """What is wrong, by character; what happens to one tag many times is said once, with its count."""
    errors = [TraceError("truncated", "the text ends at the token limit", len(text))] if truncated else []
    first = _first_appearances(tags)
    for form in ORDER:
        if form not in first:
            opening = form.replace("/", "")
            if form != opening and opening in first:
                errors.append(TraceError("unclosed", f"{opening} is never closed", tags[first[opening]].chars.start))
            else:
                errors.append(TraceError("missing", f"{form} is missing", len(text)))
    nested = _nested(tags, first)
    for inner, outer in nested:
        errors.append(TraceError("nested", f"<{inner}> opens inside <{outer}>", tags[first[f"<{inner}>"]].chars.start))
    explained = {name for pair in nested for name in pair}
    for form, i in first.items():
        if form not in placed and tags[i].name not in explained:
            errors.append(TraceError("misordered", f"{form} is out of its place", tags[i].chars.start))
    counts = Counter((tag.damage or "duplicate", tag.form) for tag in found)
    seen: set[tuple[str, str]] = set()
    for tag in found:
        key = (tag.damage or "duplicate", tag.form)
        if key in seen or (not tag.damage and tag is tags[first[tag.form]]):
            continue
        seen.add(key)
        code, times = key[0], counts[key]
        reason = f"{tag.form} stands {times} times" if code == "duplicate" else f"{tag.form} is {_DAMAGE[code]}"
        errors.append(
            TraceError(code, reason + (f", {times} times" if times > 1 and tag.damage else ""), tag.chars.start)
        )
    return tuple(sorted(errors, key=_by_place))


def _by_place(error: TraceError) -> tuple[int, str, str]:
    return error.at, error.code, error.message


def _forced(tags: Sequence[Tag], offsets: np.ndarray, forced: np.ndarray) -> Iterator[TraceError]:
    """The tags that hold a forced token."""
    held = np.zeros(int(offsets[-1]) + 1, bool)
    for token in np.flatnonzero(forced):
        held[offsets[token] : offsets[token + 1]] = True
    for tag in tags:
        if held[tag.chars.start : tag.chars.stop].any():
            yield TraceError("forced", f"{tag.form} was set by the engine when the budget was spent", tag.chars.start)


_DAMAGE = {"attribute": "written with attributes", "fenced": "in code", "disguised": "written in disguise"}


def _nested(tags: Sequence[Tag], first: Mapping[str, int]) -> list[tuple[str, str]]:
    """(inner, outer) names of blocks that open between another block's tags, where only `winner` in `result` may."""
    pairs = []
    for outer in TAGS[1:]:
        start, stop = first.get(f"<{outer}>", -1), first.get(f"</{outer}>", -1)
        for inner in TAGS:
            allowed = inner == outer or (inner, outer) == ("winner", "result")
            if start >= 0 and not allowed and start < first.get(f"<{inner}>", -1) < stop:
                pairs.append((inner, outer))
    return pairs
