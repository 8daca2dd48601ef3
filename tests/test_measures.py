"""What an evaluation says of a judge is what the judge did."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest

from pkv.competition import compose, parse
from pkv.evaluate import measured, summarise
from pkv.records import FIGHTERS, Group, Problem, Prompt, Rollout
from pkv.rewards import Scorer

GOLD = Problem("p", "How many are 3 and 4?", "7")


def group(scorer: Scorer, answers: tuple[int, int, int], winners: list[str]) -> Group:
    """One group in which the fighters always say the same and the judge picks `winners`."""
    says = {
        name: f"I add them: 3+4={value}. The answer is {value}." for name, value in zip(FIGHTERS, answers, strict=True)
    }
    texts = [compose(says, "Beep.", name, f"Answer: {answers[FIGHTERS.index(name)]}") for name in winners]
    traces = tuple(parse(text) for text in texts)
    tokens, logprobs = np.zeros(4, np.int32), np.zeros(4, np.float32)
    rollouts = tuple(Rollout("p", sample, tokens, logprobs, logprobs, "stop") for sample in range(len(texts)))
    return Group(Prompt(GOLD, tokens), rollouts, traces, tuple(scorer.score(GOLD, trace) for trace in traces))


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"correctness": 1.0}, 40) as scorer:
        yield scorer


def test_a_judge_that_always_names_the_same_one_is_biased_and_an_even_one_is_not(scorer):
    always = group(scorer, (7, 7, 7), ["knight"] * 6)
    turns = group(scorer, (7, 7, 7), [name for name, _ in zip(cycle(FIGHTERS), range(6))])
    assert summarise(measured([always]))["judge/position_bias"] == pytest.approx(2 / 3)
    assert summarise(measured([always]))["judge/winner_entropy"] == 0
    assert summarise(measured([turns]))["judge/position_bias"] == pytest.approx(0)


def test_naming_the_only_right_fighter_is_merit_and_no_bias(scorer):
    merit = group(scorer, (8, 7, 9), ["knight"] * 6)
    turns = group(scorer, (7, 7, 7), list(FIGHTERS))
    assert "judge/position_bias" not in summarise(measured([merit]))
    metrics = summarise(measured([merit, turns]))
    assert metrics["judge/position_bias"] == pytest.approx(0)
    assert metrics["judge/right"] == 1
    assert metrics["judge/gain"] == pytest.approx((6 * 2 / 3 + 3 * 0) / 9)


def test_always_wrong_fighters_show_a_bias_too(scorer):
    wrong = group(scorer, (1, 2, 3), ["viking"] * 3)
    assert summarise(measured([wrong]))["judge/position_bias"] == pytest.approx(2 / 3)


def test_lift_is_what_a_judge_sees_and_not_whom_it_trusts(scorer):
    """The knight is right three times of four: naming always him is right as often, and sees nothing."""
    knights, pirates = group(scorer, (8, 7, 9), ["knight"] * 3), group(scorer, (7, 8, 9), ["knight"])
    trusts = summarise(measured([knights, pirates]))
    assert trusts["reward/judge_accuracy"] == 0.75 and trusts["judge/lift"] == pytest.approx(0)
    sees = summarise(measured([knights, group(scorer, (7, 8, 9), ["pirate"])]))
    assert sees["judge/lift"] == pytest.approx(1 - (0.75**2 + 0.25**2))
    blind = summarise(measured([group(scorer, (8, 7, 9), ["pirate"]), group(scorer, (7, 8, 9), ["knight"])]))
    assert blind["judge/lift"] == pytest.approx(-0.5)
    assert "judge/lift" not in summarise(measured([group(scorer, (7, 7, 7), ["knight"])]))
