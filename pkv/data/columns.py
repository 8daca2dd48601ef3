"""What the columns of a row mean: pkv's own, GSM8K's and MATH's shapes, each one small function in SHAPES."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pkv.config import UserError, half_character
from pkv.records import Problem

_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>")
_GOLD_MARK = "####"
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,4}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s{1,4}([^\s{}$]{1,40})")


class Gold(NamedTuple):
    """A row's gold answer, and its worked solution where it has one."""

    answer: str
    solution: str = ""


def _question_answer(row: Mapping[str, Any]) -> Gold:
    """pkv's own shape, or GSM8K's: a worked solution with calculator annotations, and the gold answer behind ####."""
    answer = _text(row, "answer")
    solution, mark, gold = answer.rpartition(_GOLD_MARK)
    if mark:
        return Gold(gold.strip(), _ANNOTATION.sub("", solution).strip())
    if _ANNOTATION.search(answer):
        raise ValueError(f"its answer has calculator annotations but no line `{_GOLD_MARK} gold`")
    return Gold(answer)


def _problem_answer(row: Mapping[str, Any]) -> Gold:
    """MATH-like with the gold answer in a column of its own."""
    solution = row.get("solution")
    return Gold(_text(row, "answer"), solution.strip() if isinstance(solution, str) else "")


def _problem_solution(row: Mapping[str, Any]) -> Gold:
    """MATH: the gold answer is the last box of the worked solution."""
    solution = _text(row, "solution")
    gold = last_box(solution)
    if gold is None:
        raise ValueError("its solution has no \\boxed{...} answer")
    return Gold(gold, solution)


# (the question's column, the column with the gold answer) -> how to read it; the first that fits all columns wins.
SHAPES: dict[tuple[str, str], Callable[[Mapping[str, Any]], Gold]] = {
    ("question", "answer"): _question_answer,
    ("problem", "answer"): _problem_answer,
    ("problem", "solution"): _problem_solution,
}


def read_rows(rows: Iterable[tuple[str, Any]], source: str) -> list[Problem]:
    """The problems in (place, row) pairs, all of the first row's shape. Raises UserError that names the place."""
    problems: list[Problem] = []
    places: dict[str, str] = {}
    shape: tuple[str, str] | None = None
    for place, row in rows:
        where = f"{source}, {place}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with a question and an answer, got {type(row).__name__}")
        shape = shape or _detect(row, where)
        try:
            problem = _read_row(row, shape, source, places)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if problem.id in places:
            raise UserError(f"{where}: the id {problem.id!r} was used before, in {places[problem.id]}; ids must differ")
        places[problem.id] = place
        problems.append(problem)
    return problems


def _detect(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    for shape in SHAPES:
        if all(column in row for column in shape):
            return shape
    known = "; ".join(f"{question} and {gold}" for question, gold in SHAPES)
    missing = " has no answer:" if {"question", "problem"} & set(row) else ""
    raise UserError(f"{where}:{missing} expected the columns {known}; got {', '.join(map(str, row)) or 'none'}")


def _read_row(row: Mapping[str, Any], shape: tuple[str, str], source: str, taken: Mapping[str, str]) -> Problem:
    """One row as a problem; other columns with plain values are kept in `extra`. Raises ValueError."""
    question = row.get(shape[0])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its {shape[0]} must be text, got {_describe(question)}")
    gold = SHAPES[shape](row)
    if not gold.answer:
        raise ValueError("its answer is empty")
    for column in ("id", *shape):
        if half := half_character(str(row.get(column))):
            raise ValueError(f"its {column} has {half!r}, half of a character and no text; leave it out")
    extra = {
        str(column): value
        for column, value in row.items()
        if column not in ("id", shape[0], "answer", "solution") and isinstance(value, (str, int, float, bool))
    }
    if gold.solution:
        extra["solution"] = gold.solution
    return Problem(_id(row, question, taken), question.strip(), gold.answer, source, extra)


def _id(row: Mapping[str, Any], question: str, taken: Mapping[str, str]) -> str:
    """The row's own id, or a hash of its question: the same in every file and in every process."""
    stated = row.get("id")
    if stated is not None:
        if not isinstance(stated, (str, int)) or isinstance(stated, bool) or not str(stated).strip():
            raise ValueError(f"its id must be text or a whole number, got {_describe(stated)}")
        return str(stated)
    digest = hashlib.sha256(question.strip().encode()).hexdigest()[:16]
    again = 2
    name = digest
    while name in taken:  # the same question once more: public sets have such rows, and they are not an error
        name, again = f"{digest}-{again}", again + 1
    return name


def _text(row: Mapping[str, Any], column: str) -> str:
    """A column's text; a number is written out. Raises ValueError."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"has no {column}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"its {column} must be text or a number, got {_describe(value)}")
    return str(value).strip()


def last_box(text: str) -> str | None:
    """The inside of the last `\\boxed{...}` whose braces match, or of `\\boxed x`; None without one."""
    stack: list[int | None] = []
    last: tuple[int, str] | None = None
    for match in _BRACE.finditer(text):
        if match["box"]:
            stack.append(match.end())
        elif match["open"]:
            stack.append(None)
        elif match["close"] and stack:
            start = stack.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, text[start : match.start()].strip())
    for match in _BARE_BOX.finditer(text):
        if last is None or match.start() > last[0]:
            last = (match.start(), match[1].rstrip(".,"))
    return last[1] if last else None


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
