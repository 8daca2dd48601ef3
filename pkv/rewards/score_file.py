"""`pkv score`: a file of completions, scored line by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pkv.competition.parser import parse
from pkv.config import Config, RewardConfig, RoundConfig, UserError, describe
from pkv.records import Problem
from pkv.rewards.scoring import Scorer
from pkv.rewards.table import DEFAULT_WEIGHTS

Offsets = Callable[[str], np.ndarray]


def score_lines(
    path: str | Path, config: Config | None = None, round_name: str | None = None, offsets: Offsets | None = None
) -> Iterator[dict[str, Any]]:
    """Score lines `{"id", "question", "answer", "completion"}`; yields a result a line, in order.

    round_name: whose weights and length count; without it, the config's last round. Without a config, every reward of
    SPEC's table with `DEFAULT_WEIGHTS`. offsets: text -> int [T+1], where a tokenizer's tokens start, then the text's
    length; without it words stand in for tokens. Results: `{"id", "rewards": {name: value or null}, "total", "errors":
    [code, ..., "unscored:<reward>"], "blocks": {name: [start, end]}, "final_answer"}`, places in characters.
    Raises UserError with the line's number.
    """
    chosen = _choose_round(config, round_name)
    with Scorer(chosen.weights, chosen.length_optimum, config.rewards if config else RewardConfig()) as scorer:
        for problem, completion in read_lines(path):
            trace = parse(completion, offsets(completion) if offsets else None)
            card = scorer.score(problem, trace)
            yield {
                "id": problem.extra["id"],
                "rewards": {name: reward.value for name, reward in card.rewards.items()},
                "total": card.total,
                "errors": [error.code for error in trace.errors] + [f"unscored:{name}" for name in card.unscored],
                "blocks": {name: [*block.chars] for name, block in trace.blocks.items()},
                "final_answer": card.final_answer,
            }


def read_lines(path: str | Path) -> Iterator[tuple[Problem, str]]:
    """Problems with their completions; empty lines are passed over. Raises UserError with the line's number."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below; only the opening is the user's mistake
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of JSON lines") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _read_line(line, f"{path}, line {number}")


def _read_line(line: bytes, where: str) -> tuple[Problem, str]:
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object in UTF-8: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {describe(record)}")
    for key in ("id", "question", "answer", "completion"):
        if key not in record:
            raise UserError(f"{where}: {key!r} is missing; a line needs id, question, answer and completion")
        numeric = key in ("id", "answer") and isinstance(record[key], int | float) and not isinstance(record[key], bool)
        if not (numeric or isinstance(record[key], str)):
            raise UserError(f"{where}: {key!r}: expected text, got {describe(record[key])}")
    if not str(record["answer"]).strip():
        raise UserError(f"{where}: 'answer' is empty; nothing can be right without it")
    extra = {"id": record["id"]}
    return Problem(str(record["id"]), record["question"], str(record["answer"]), str(where), extra), record[
        "completion"
    ]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _choose_round(config: Config | None, name: str | None) -> RoundConfig:
    rounds = config.rounds if config else ()
    if name is None:
        return rounds[-1] if rounds else RoundConfig(weights=DEFAULT_WEIGHTS)
    for each in rounds:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in rounds) or "none: pass a config with rounds"
    raise UserError(f"--round {name}: no such round; there are: {known}")
