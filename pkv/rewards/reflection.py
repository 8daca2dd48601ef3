"""Does a fighter mend its own mistakes, in its own voice: corrections that correct are paid, words about them are not.

A correction is a cue ("no, that is wrong"), before it a claim, after it the same claim with another value (the same
left side of an equation, the same variable, or the value alone), and the new value is used: in later working or as the
answer. From wrong to right is worth most. Two corrections a block count at most, each with another cue and about
another claim, so that neither repeating a cue nor going back and forth pays.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Set
from dataclasses import dataclass
from fractions import Fraction

from pkv.rewards.arithmetic import evaluate, read_number
from pkv.rewards.context import Context
from pkv.rewards.equations import Equation, numbers
from pkv.rewards.lexicon import lexicon, words

VOICE = 0.2  # the most that a character's words earn
VOICE_WORDS = 3  # different ones, in as many different phrases
MOST_CORRECTIONS = 2
WRONG_TO_RIGHT, CHANGED, RIGHT_TO_WRONG = 0.4, 0.2, 0.1
MOST_CUES = 200  # looked at; a block that announces more corrections is spam, and must not cost quadratic time
WINDOW = 300  # characters after a cue in which the new value must stand

_VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_PHRASE_END = re.compile(r"[.!?;\n]+")
# "The answer is 5", "that makes 12", "so I get 7": a claim without an equation.
_STATEMENT = re.compile(
    r"\b(?P<what>answer|result|total|sum|product|difference|rest|share|it|that|we|i)\s+"
    r"(?:(?:is|be|equals|makes|gives|comes to|get|have|find|must be|should be)\s+|=\s*)(?P<value>\d[\d,]*(?:\.\d+)?)"
)
_BARE_VALUE = re.compile(
    r"[\s,:.!—-]{0,4}(?:(?:it|that)(?:'s| is| be)|make (?:it|that)|it must be)?\s*"
    r"(?P<value>\d[\d,]*(?:\.\d+)?)(?!\s*[-+*/^=\d(])"
)


@dataclass(frozen=True)
class Claim:
    """Something said to be so: what it is about, its value, whether that holds (None: not known), and where."""

    about: str
    value: str
    holds: bool | None
    at: int
    stop: int


@dataclass(frozen=True)
class Correction:
    """A claim taken back for another, after a cue."""

    cue: str
    old: Claim
    new: Claim
    worth: float


def reflection(name: str, context: Context) -> float:
    """A small part for the character's voice, the rest for at most two corrections that correct."""
    worths = sorted((found.worth for found in find_corrections(name, context)), reverse=True)
    return min(1.0, voice(name, context.text(name)) + sum(worths[:MOST_CORRECTIONS]))


def voice(name: str, text: str) -> float:
    """Different words of the character, counted once a phrase, so that a heap of them is one."""
    own = lexicon().personas[name]
    said: set[str] = set()
    phrases = 0
    for phrase in _PHRASE_END.split(text):
        new = own.intersection(words(phrase)) - said
        said |= new
        phrases += bool(new)
    return VOICE * (min(VOICE_WORDS, phrases) / VOICE_WORDS)


def find_corrections(name: str, context: Context) -> list[Correction]:
    """The corrections of a block, in order, each with its worth."""
    return context.remember("corrections", name, lambda: _find_corrections(name, context))


def _find_corrections(name: str, context: Context) -> list[Correction]:
    text = context.normalised(name).lower()
    claims = _find_claims(text, context.equations(name), context.gold)
    uses = _Uses.of(claims, context.givens)
    by_end = sorted(claims, key=lambda claim: claim.stop)
    starts = [claim.at for claim in claims]
    latest: dict[str, Claim] = {}  # by what they are about: the last claims that end before the cue
    old: Claim | None = None
    found: list[Correction] = []
    spent: set[str] = set()
    ended = 0
    for cue, start, stop in _cue_clusters(text, claims)[:MOST_CUES]:
        while ended < len(by_end) and by_end[ended].stop <= start:
            old = by_end[ended]
            latest[old.about] = old
            ended += 1
        after = claims[bisect.bisect_left(starts, stop) : bisect.bisect_right(starts, stop + WINDOW)]
        pair = _match(latest, after) or _match_bare(old, text, stop, context.gold)
        if pair is None or cue in spent or pair[1].about in spent:
            continue
        if not _is_used(pair[1], text, uses, context, name) or not _matters(pair[1], uses, context, name):
            continue
        spent |= {cue, pair[1].about}
        found.append(Correction(cue, *pair, _worth(*pair)))
    return found


@dataclass(frozen=True)
class _Uses:
    """Where the claims of a block are made and used for the last time."""

    last: dict[str, Claim]  # by what they are about
    number: dict[Fraction, int]  # by number: where the last claim starts that works with it
    letter: dict[str, int]  # by variable: the same
    reached: set[Fraction]  # what the question gives, and what claims find that work with it

    @classmethod
    def of(cls, claims: list[Claim], givens: Set[Fraction]) -> _Uses:
        number = {value: claim.at for claim in claims for value in numbers(claim.about)}
        letter = {name: claim.at for claim in claims for name in _VARIABLE.findall(claim.about)}
        reached = set(givens)
        for claim in claims:
            found = read_number(claim.value)
            if found is not None and not reached.isdisjoint(numbers(claim.about)):
                reached.add(found)
        return cls({claim.about: claim for claim in claims}, number, letter, reached)


def _cue_clusters(text: str, claims: list[Claim]) -> list[tuple[str, int, int]]:
    """Cues as (words, start, stop); those without a claim between them are one, known by its words."""
    ends = sorted(claim.at for claim in claims)
    clusters: list[tuple[str, int, int]] = []
    place = 0
    for match in lexicon().cues.finditer(text):
        while place < len(ends) and ends[place] < match.start():
            place += 1
        follows = clusters and (place == 0 or ends[place - 1] < clusters[-1][2])
        if clusters and follows:
            first = clusters[-1]
            clusters[-1] = (first[0], first[1], match.end())
        else:
            clusters.append((match[0].strip(",.:!"), match.start(), match.end()))
    return clusters


def _find_claims(text: str, equations: list[Equation], gold: Fraction | None) -> list[Claim]:
    claims = []
    for equation in equations:
        value = "".join(equation.right)
        claims.append(Claim("".join(equation.left), value, equation.holds, equation.at, equation.stop))
    for match in _STATEMENT.finditer(text):
        stated = read_number(match["value"].rstrip(","))
        if stated is not None:
            holds = None if gold is None or match["what"] not in ("answer", "result", "total") else stated == gold
            claims.append(Claim("the answer", str(stated), holds, match.start(), match.end()))
    return sorted(claims, key=lambda claim: claim.at)


def _match(latest: dict[str, Claim], after: list[Claim]) -> tuple[Claim, Claim] | None:
    """The last claim before a cue that is made again behind it with another value."""
    for new in after:
        old = latest.get(new.about)
        if old is not None and not _same(old.value, new.value):
            return old, new
    return None


def _match_bare(old: Claim | None, text: str, stop: int, gold: Fraction | None) -> tuple[Claim, Claim] | None:
    """A cue straight after a claim, and straight behind the cue another value: "20 / 5 = 5, no wait, 4"."""
    match = _BARE_VALUE.match(text, stop)
    if match is None or old is None:
        return None
    value = str(read_number(match["value"].rstrip(",")))
    if _same(old.value, value):
        return None
    holds = None
    if old.holds is False and old.about != "the answer":
        holds = _same(value, str(_left_value(old)))
    elif old.about == "the answer" and gold is not None:
        holds = _same(value, str(gold))
    return old, Claim(old.about, value, holds, match.start("value"), match.end("value"))


def _left_value(claim: Claim) -> Fraction | None:
    return evaluate(tuple(re.findall(r"\d[\d,]*(?:\.\d+)?|[-+*/^()]", claim.about)))


def _same(first: str, second: str) -> bool:
    return first == second or (read_number(first) is not None and read_number(first) == read_number(second))


def _is_used(new: Claim, text: str, uses: _Uses, context: Context, name: str) -> bool:
    """The new value is the block's answer or stands in later working, and the claim isn't changed back later."""
    last_word = uses.last.get(new.about, new)
    if last_word.at >= new.stop and not _same(last_word.value, new.value):
        return False
    answer = context.answer(name).value
    if answer is not None and _same(answer, new.value):
        return True
    if uses.letter.get(new.about, -1) >= new.stop:
        return True
    value = read_number(new.value)
    if value is None:
        return new.value in text[new.stop :]
    return uses.number.get(value, -1) >= new.stop


def _matters(new: Claim, uses: _Uses, context: Context, name: str) -> bool:
    """The claim works with what the question gives, or what follows from it, or is the answer: no planted 1 + 1."""
    figures = numbers(new.about)
    if not figures or not context.givens or not uses.reached.isdisjoint(figures):
        return True
    answer = context.answer(name).value
    return answer is not None and _same(answer, new.value)


def _worth(old: Claim, new: Claim) -> float:
    if new.holds and old.holds is False:
        return WRONG_TO_RIGHT
    if new.holds is False:
        return RIGHT_TO_WRONG if old.holds else 0.0
    return CHANGED
