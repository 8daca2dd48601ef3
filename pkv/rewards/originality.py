"""Is a fighter's solution its own: three signals of copying, each of which sees what the others miss.

- LCS of the content words, over the longer text: a copy with some words swapped;
- 5-gram containment, over the shorter text: a copy inside padding;
- shared working, over the shorter list: the same equations in other words, whatever the synonyms.
What all must share is masked first: numbers, formulas, the characters' own words, what the question says. Fighters in a
small domain write 20 to 60 words, of which masking may leave a handful: below MIN_WORDS words are no evidence, and the
equations alone decide; where there are no equations either, the unmasked words do. The largest signal counts.

The same working in the same order is copying even when every word is the fighter's own: SPEC asks for its own approach.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set

from pkv.mathcheck import parse_number
from pkv.rewards.context import Context
from pkv.rewards.equations import Equation, numbers
from pkv.rewards.lexicon import is_language, is_sign, lexicon, number_words, words
from pkv.rewards.notation import normalise
from pkv.rewards.soundness import sound_share

# Overlap up to which a solution is its own (independent texts: 0.04 to 0.3) and from which it is a copy (every fifth
# word swapped: 0.80); half copied, 0.52, lies about the middle.
OWN, COPY = 0.3, 0.7
NGRAM = 5
MIN_WORDS = 8  # masked words below which words are no evidence
MOST_COUNTED = 12  # an answer up to this may be counted or read off working with the question's numbers
TRIVIAL_WORDS = 8  # different words below which a block is no attempt

_COMMAND = re.compile(r"\\[A-Za-z]+")


def originality(name: str, earlier: Sequence[str], context: Context) -> float:
    """From +0.5, its own approach, linearly to -0.5, a copy of one of the earlier fighters or no attempt at all.

    Where an earlier fighter made no attempt there was nothing to copy: then nothing above 0 can be earned. What is
    above 0 is earned by the share of its working that holds, for a copy with other numbers is no approach, and half
    of it where that working doesn't come to the block's answer.
    """
    if not is_attempt(name, context):
        return -0.5
    most = max(overlap(name, other, context) for other in earlier)
    value = 0.5 - min(1.0, max(0.0, (most - OWN) / (COPY - OWN)))
    if value <= 0.0 or not all(is_attempt(other, context) for other in earlier):
        return min(0.0, value)
    return value * sound_share(name, context) * (0.5 if _works_elsewhere(name, context) else 1.0)


def _works_elsewhere(name: str, context: Context) -> bool:
    """Whether a block works out numbers, but its answer, a number too, comes from no step that may hold.

    It may be a step's result or operand, that result rounded or its last digit, or a count that no step says.
    """
    answer = parse_number(context.answer(name).value or "")
    steps = [step for step in context.equations(name) if step.holds is not False]
    if answer is None or not any(step.holds is not None for step in context.equations(name)):
        return False
    if 0 <= answer <= MOST_COUNTED and any(step.holds and step.operands & context.givens for step in steps):
        return False
    said = {answer, answer * 100, answer / 100}  # 0.25 is said as 25%
    for step in steps:
        value = step.right_value
        if value in said or said & step.operands:
            return False
        if value is not None and answer in (math.floor(value), math.ceil(value)):
            return False
    return True


def is_attempt(name: str, context: Context) -> bool:
    """Whether a block is a solution at all: enough words of a language, on this question, with working or an answer."""
    return context.remember("attempt", name, lambda: _is_attempt(name, context))


def _is_attempt(name: str, context: Context) -> bool:
    said = words(context.text(name))
    if len(set(said)) < TRIVIAL_WORDS:
        return False
    equations = context.equations(name)
    if not equations and context.answer(name).value is None:
        return False
    question = set(words(context.problem.question)) - lexicon().small
    figures = {*numbers(context.normalised(name)), *number_words(said)}
    shares = context.givens & figures or question.intersection(said)
    if (context.givens or question) and not shares and not _leads_to_answer(name, context):
        return False
    works = any(equation.holds and equation.operands & context.givens for equation in equations)
    return works or is_language(said)


def _leads_to_answer(name: str, context: Context) -> bool:
    """Whether a step that holds gives the block's answer: 40 + 18 = 58 for 29 and 29, worked in tens and ones."""
    answer = parse_number(context.answer(name).value or "")
    return answer is not None and any(e.holds and e.right_value == answer for e in context.equations(name))


def overlap(name: str, other: str, context: Context) -> float:
    """How much of two fighters' solutions is the same, 0..1; 0 when either says nothing."""
    return context.remember("overlap", f"{name} {other}", lambda: _overlap(name, other, context))


def _overlap(name: str, other: str, context: Context) -> float:
    first, second = _masked(name, context), _masked(other, context)
    steps, other_steps = working(name, context), working(other, context)
    wordless = min(len(_content(first)), len(_content(second))) < MIN_WORDS
    if wordless and not (steps and other_steps):
        first, second = words(context.text(name)), words(context.text(other))
        return max(same_sequence(first, second), contained(first, second))
    signals = [shared_working(steps, other_steps)]
    if min(len(first), len(second)) >= MIN_WORDS:
        signals.append(contained(first, second))
    if not wordless:
        signals.append(same_sequence(_content(first), _content(second)))
    return max(signals)


def same_sequence(first: Sequence[str], second: Sequence[str]) -> float:
    """Longest common subsequence of words, as a share of the longer text."""
    from rapidfuzz.distance import LCSseq

    return LCSseq.normalized_similarity(first, second) if first and second else 0.0


def contained(first: Sequence[str], second: Sequence[str]) -> float:
    """Common 5-grams of words, as a share of the text that has fewer."""
    ones, others = ({tuple(text[at : at + NGRAM]) for at in range(len(text) - NGRAM + 1)} for text in (first, second))
    return len(ones & others) / min(len(ones), len(others)) if ones and others else 0.0


def shared_working(own: Set[object], earlier: Set[object]) -> float:
    """Common steps, as a share of the list that has fewer: own steps added to copied ones don't hide them.

    But where the earlier fighter took a single step, which the question may ask for, the later one's own steps count.
    """
    if not own or not earlier:
        return 0.0
    return len(own & earlier) / (len(own) if len(earlier) == 1 else min(len(own), len(earlier)))


def working(name: str, context: Context) -> frozenset[object]:
    """The steps that a block works out: its equations' facts, without what the question says and bare results."""
    given = "".join(normalise(context.problem.question).split())
    own = (e for e in context.equations(name) if not _is_bare(e) and "".join(e.left) not in given)
    return frozenset(fact for equation in own for fact in equation.facts)


def _is_bare(equation: Equation) -> bool:
    """`x = 5`, a result."""
    return len(equation.left) == 1 and equation.right_value is not None


def _masked(name: str, context: Context) -> list[str]:
    """The words that a fighter could have chosen otherwise."""
    masked = lexicon().persona_words | (set(words(context.problem.question)) - lexicon().small)
    said = words(_COMMAND.sub(" ", context.text(name)))
    return [word for word in said if word not in masked and (len(word) > 1 or word in "ai" or is_sign(word))]


def _content(said: Sequence[str]) -> list[str]:
    """Without the small words, in which any two short texts agree (measured on honest ones: up to 0.57 of the LCS)."""
    return [word for word in said if word not in lexicon().small]
