"""What the rewards of one trace share: its blocks' texts, equations and answers, each worked out once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar, cast

from pkv.mathcheck import Extraction, VerifyError, extract_answer, parse_number
from pkv.records import FIGHTERS, Problem, Trace
from pkv.rewards.equations import Equation, find_equations, numbers
from pkv.rewards.notation import normalise

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """One trace of one problem, as the built-in rewards see it.

    length_optimum: tokens of a fighter's block that earn the most.
    verify: (answer, gold) -> whether it is right; raises VerifyError where that can't be found out.
    """

    problem: Problem
    trace: Trace
    length_optimum: int
    verify: Callable[[str, str], bool]
    _memory: dict[tuple[str, str], object] = field(default_factory=dict, repr=False)

    def text(self, name: str) -> str:
        """A block's text; "" when the trace has no such block."""
        return self.trace.block_text(name) or ""

    def normalised(self, name: str) -> str:
        """A block's text with operators as signs (see notation.py)."""
        return self.remember("normalised", name, lambda: normalise(self.text(name)))

    def equations(self, name: str) -> list[Equation]:
        """The equations in a block."""
        return self.remember("equations", name, lambda: find_equations(self.normalised(name)))

    @functools.cached_property
    def judgement(self) -> str:
        """What the judge says: the result block without the winner's tag and what it holds."""
        own = [piece.chars for piece in self.trace.segments if piece.owner == "result"]
        return "\n".join(self.trace.text[chars.start : chars.stop] for chars in own) if self.text("result") else ""

    @functools.cached_property
    def givens(self) -> frozenset[Fraction]:
        """The numbers in the question."""
        return frozenset(numbers(normalise(self.problem.question)))

    @functools.cached_property
    def gold(self) -> Fraction | None:
        """The gold answer where it is a plain number."""
        return parse_number(self.problem.answer)

    def answer(self, name: str) -> Extraction:
        """The answer that a block states; the block "answer" is the text after the construct."""
        return self.remember("answer", name, lambda: extract_answer(self.text(name)))

    def is_right(self, name: str) -> bool:
        """Whether a block's answer is right; no answer is not. Raises VerifyError, each time that it is asked."""
        value = self.answer(name).value
        if value is None:
            return False
        outcome = self.remember("right", value, lambda: self._verify(value))
        if isinstance(outcome, VerifyError):
            raise outcome
        return outcome

    def fighters_right(self) -> dict[str, bool]:
        """Which fighters' own answers are right. Raises VerifyError."""
        return {name: self.is_right(name) for name in FIGHTERS}

    def _verify(self, value: str) -> bool | VerifyError:
        try:
            return self.verify(value, self.problem.answer)
        except VerifyError as error:  # kept, so that one slow answer is not waited for by every reward that asks
            return error

    def remember(self, what: str, name: str, find: Callable[[], T]) -> T:
        """What was found before under these names, or `find()`."""
        key = (what, name)
        if key not in self._memory:
            self._memory[key] = find()
        return cast(T, self._memory[key])
