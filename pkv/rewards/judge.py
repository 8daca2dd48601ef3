"""Does the judge judge: it picks a fighter that was right, it checks what it praises; and the measures of a judge."""

from __future__ import annotations

import re

from pkv.mathcheck import VerifyError, parse_number
from pkv.records import FIGHTERS
from pkv.rewards.context import Context
from pkv.rewards.equations import Equation, find_equations, normalise, numbers
from pkv.rewards.lexicon import words
from pkv.rewards.outcome import winner_name

DENIAL = 80  # characters around an equation in which it may be called wrong
_DENIES = re.compile(r"\b(?:not|no|wrong|false|incorrect|mistakes?|errs?|erred|error|fails?)\b|n't\b", re.IGNORECASE)

NAMES_WINNER, NAMES_OTHERS, STATES_ANSWER, REDOES_WORK, QUOTES_WORK = 0.2, 0.2, 0.2, 0.4, 0.2


def judge_accuracy(context: Context) -> float | None:
    """1.0 when the winner was right, else 0; None where the fighters agree, for there nothing was judged.

    Raises VerifyError.
    """
    right = context.fighters_right()
    if len(set(right.values())) == 1:
        return None
    return float(right.get(winner_name(context.trace) or "", False))


def judge_reasoning(context: Context) -> float:
    """Whether the ruling names the winner and the others, states the winner's answer, and redoes a step of its work.

    A step is redone by an equation that holds and is in the winner's work, or follows from its numbers; one with
    variables can only be quoted, which is worth less. Praise earns the naming only.
    """
    name = winner_name(context.trace)
    if name is None or not context.judgement:
        return 0.0
    said = set(words(context.judgement))
    ruling = normalise(context.judgement)
    value = NAMES_WINNER * (name in said)
    value += NAMES_OTHERS * sum(other in said for other in FIGHTERS if other != name) / (len(FIGHTERS) - 1)
    answer = context.answer(name).value
    if answer is not None:
        exact = parse_number(answer)
        stated = answer in context.judgement if exact is None else exact in numbers(ruling)
        value += STATES_ANSWER * stated
    return value + _checking(name, ruling, context)


def _checking(name: str, ruling: str, context: Context) -> float:
    """What a redone step earns; nothing where the ruling says a false equation of the winner after it as if it held."""
    work = context.equations(name)
    facts = {fact for equation in work for fact in equation.facts}
    slips = {(equation.left, equation.right) for equation in work if equation.holds is False}
    figures = set(numbers(context.normalised(name)))
    best = 0.0
    for equation in find_equations(ruling):
        own = equation.facts <= facts
        if (equation.left, equation.right) in slips and not _is_denied(ruling, equation):
            return 0.0
        if equation.holds and (own or (facts and {*equation.operands, equation.right_value} <= figures)):
            best = REDOES_WORK
        elif own and equation.holds is None:
            best = max(best, QUOTES_WORK)
    return best


def _is_denied(ruling: str, equation: Equation) -> bool:
    """Whether the words around an equation, up to the next full stops, call it wrong."""
    before = ruling[max(0, equation.at - DENIAL) : equation.at].rpartition(".")[2]
    after = ruling[equation.stop : equation.stop + DENIAL].partition(".")[0]
    return any(_DENIES.search(part) for part in (before, after))


def measure(context: Context) -> dict[str, object]:
    """The judge's measures of one trace, by the names that logs use; None where it can't be said.

    judge/gain: whether the winner was right less the share of fighters who were.
    """
    name = winner_name(context.trace)
    measures: dict[str, object] = {"winner": name}
    try:
        right = context.fighters_right()
    except VerifyError:
        unknown = ("any_right", "majority_right", "right", "disagree", "gain")
        return measures | {f"judge/{key}": None for key in unknown}
    count = sum(right.values())
    chosen = name is not None and right[name]
    return measures | {
        "judge/any_right": count > 0,
        "judge/majority_right": 2 * count > len(right),
        "judge/right": chosen,
        "judge/disagree": 0 < count < len(right),
        "judge/gain": float(chosen) - count / len(right),
    }
