"""The curriculum as a line of stages: warm-up, then the rounds; where a global step stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkv.config import Config, RoundConfig, UserError
from pkv.rewards import RULES, budget, load_user_files, resolve_weights

WARMUP = "warm-up"


def before(name: str) -> str:
    """The name of the evaluation at a stage's start."""
    return f"before {name}"


@dataclass(frozen=True)
class Stage:
    """Global steps [first, stop) of the run; `round` is None in the warm-up.

    weights, length_optimum, max_new_tokens, fighter_tokens: the round's own; the warm-up is measured with those of
    the first round.
    whole_trace: the share of every reward's advantage that all tokens of a response get.
    """

    name: str
    first: int
    stop: int
    round: RoundConfig | None
    weights: Mapping[str, float]
    whole_trace: Mapping[str, float]
    length_optimum: int
    max_new_tokens: int
    fighter_tokens: int

    def budget(self, step: int) -> int:
        """max_new_tokens at a global step of the stage: in equal parts through the round's budgets up to its own.

        Of more budgets than steps the first are left out: the longest responses are what a short trial must see.
        """
        steps = self.stop - self.first
        grows = (*(self.round.budgets if self.round else ()), self.max_new_tokens)[-steps:]
        return grows[(step - self.first) * len(grows) // steps]

    @property
    def limits(self) -> tuple[int, int]:
        """What bounds a response: of two stages with the same limits the end of one is the start of the other."""
        return self.max_new_tokens, self.fighter_tokens

    @property
    def required_round(self) -> RoundConfig:
        """The round; a warm-up has none, which is a programmer's mistake."""
        if self.round is None:
            raise ValueError(f"stage {self.name} is no round")
        return self.round


def stages(config: Config) -> list[Stage]:
    """The run's stages in order; those without steps are left out. Raises UserError for an unknown reward."""
    wanted: list[tuple[str, int, RoundConfig | None]] = [(WARMUP, config.warmup.steps, None)]
    wanted += [(round_.name, round_.steps, round_) for round_ in config.rounds]
    found: list[Stage] = []
    user = tuple(load_user_files(config.rewards.user_files))
    whole = _whole_trace(config, user)
    first = 0
    for name, steps, round_ in wanted:
        like = round_ or (config.rounds[0] if config.rounds else RoundConfig())
        weights = resolve_weights(like.weights, user)
        if steps and round_ is not None and not any(weights.values()):
            raise UserError(
                f"rounds.{name}.weights: no reward has a weight, and nothing would be learnt; give correctness one, say"
            )
        if steps:
            stage = Stage(
                name,
                first,
                first + steps,
                round_,
                weights,
                whole,
                like.length_optimum,
                like.max_new_tokens,
                like.fighter_tokens,
            )
            found.append(stage)
        first += steps
    return found


def signal_rewards(config: Config) -> tuple[str, ...]:
    """The rewards of which one must differ within a group, families resolved. Raises UserError for an unknown one."""
    user = tuple(load_user_files(config.rewards.user_files))
    named = resolve_weights(dict.fromkeys(config.grpo.signal, 1.0), user, "grpo.signal")
    return tuple(name for name, wanted in named.items() if wanted)


def reward_budgets(config: Config) -> str:
    """What a trace can earn in each round, as lines for people. Raises UserError for an unknown reward."""
    rounds = [stage for stage in stages(config) if stage.round is not None]
    user = [[name for name in stage.weights if name not in RULES] for stage in rounds]
    tables = [
        f"Round {stage.name}\n{budget(stage.weights, names)}\n" for stage, names in zip(rounds, user, strict=True)
    ]
    return "\n".join(tables)


def _whole_trace(config: Config, user: Sequence[str]) -> dict[str, float]:
    """Of every reward, the share of its advantage that goes to all tokens; with `credit: sequence` all of it."""
    shares = resolve_weights(config.grpo.whole_trace, user, "grpo.whole_trace")
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise UserError(f"grpo.whole_trace.{name}: expected a share from 0 to 1, got {share:g}")
    if config.grpo.credit == "sequence":
        shares = dict.fromkeys(shares, 1.0)
    if config.grpo.judge_baseline == "rates" and shares["judge_accuracy"]:  # a fighter would be paid for rivals' errors
        raise UserError(
            "grpo.judge_baseline: rates is for the judge's own tokens; expected credit: block, and no judge_accuracy "
            "in grpo.whole_trace"
        )
    return shares


def check_requirement(round_: RoundConfig, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError when the newest evaluation before the round falls short of what it requires.

    A run that was stopped before the round's first step may have measured its start already, by its own rules.
    """
    if not round_.require:
        return
    earlier = [one for one in evaluations if one["name"] != before(round_.name)]
    metrics = earlier[-1]["metrics"] if earlier else {}
    for name, least in round_.require.items():
        where = f"rounds.{round_.name}.require.{name}"
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "none yet: nothing was evaluated before this round"
            raise UserError(f"{where}: no such held-out metric; there are {known}")
        if metrics[name] < least:
            raise UserError(
                f"{where}: at least {least:g} is required, held-out it is {metrics[name]:.3f}; "
                "lower that, or put another round before it: rounds that haven't begun may be changed"
            )
