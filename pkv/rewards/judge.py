"""Does the judge judge: it picks a fighter that was right, it checks what it praises; and the measures of a judge."""

from __future__ import annotations

import re

from pkv.mathcheck import VerifyError, parse_number
from pkv.records import FIGHTERS
from pkv.rewards.context import Context
from pkv.rewards.equations import Equation, find_equations, numbers
from pkv.rewards.lexicon import is_language, words
from pkv.rewards.notation import normalise
from pkv.rewards.outcome import winner_name
from pkv.rewards.soundness import false_steps

DENIAL = 80  # characters around an equation in which it may be called wrong
_DENIES = re.compile(
    r"\b(?:not|wrong|false|incorrect|mistaken|erred|errs|fails?|(?<!no )(?<!without )(?:mistakes?|errors?))\b"
    r"|\bno[,:.!]|n't\b",
    re.IGNORECASE,
)

NAMES_WINNER, NAMES_OTHERS, STATES_ANSWER = 0.2, 0.2, 0.2
REDOES_RESULT, REDOES_WORK = 0.4, 0.2  # the step that comes to the winner's answer; any other, or one quoted


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
    variables can only be quoted, which is worth less, as is a step on the way. Praise earns the naming only, and a
    list of names and numbers that is no language nothing but for its checking.
    """
    name = winner_name(context.trace)
    if name is None or not context.judgement:
        return 0.0
    spoken = words(context.judgement)
    said = set(spoken)
    ruling = normalise(context.judgement)
    value = 0.0
    if is_language(spoken):
        value += NAMES_WINNER * (name in said)
        value += NAMES_OTHERS * sum(other in said for other in FIGHTERS if other != name) / (len(FIGHTERS) - 1)
        value += STATES_ANSWER * _states_answer(name, ruling, context)
    return value + _checking(name, ruling, context)


def _states_answer(name: str, ruling: str, context: Context) -> bool:
    answer = context.answer(name).value
    if answer is None:
        return False
    exact = parse_number(answer)
    return answer in context.judgement if exact is None else exact in numbers(ruling)


def _checking(name: str, ruling: str, context: Context) -> float:
    """What a redone step earns; nothing where the winner's work has a false step that stands and isn't called wrong."""
    checks = find_equations(ruling)
    denied = {(check.left, check.right) for check in checks if _is_denied(ruling, check)}
    if any((slip.left, slip.right) not in denied for slip in false_steps(name, context)):
        return 0.0
    work = context.equations(name)
    facts = {fact for equation in work for fact in equation.facts}
    figures = set(numbers(context.normalised(name)))
    answer = parse_number(context.answer(name).value or "")
    best = 0.0
    for check in checks:
        own = check.facts <= facts
        if check.holds and (own or (facts and {*check.operands, check.right_value} <= figures)):
            comes_to_answer = answer is None or answer == check.right_value
            best = max(best, REDOES_RESULT if comes_to_answer else REDOES_WORK)
        elif own and check.holds is None:
            best = max(best, REDOES_WORK)
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
