"""The tiny world is honest: three ways to solve, splits that share nothing, competitions that score as they should."""

from __future__ import annotations

import dataclasses
import random
import re
from fractions import Fraction

import pytest

from pkv.competition import is_exact_layout, parse, tags_in_order
from pkv.config import UserError, WarmupConfig
from pkv.data.arithmetic import givens, problems, workings
from pkv.records import FIGHTERS
from pkv.rewards import Scorer
from pkv.rewards.equations import find_equations, numbers
from pkv.rewards.notation import normalise
from pkv.train.demonstrations import demonstrate

HONEST = WarmupConfig(copying=0.0, loose_layout=0.0, mistakes=0.0)


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"correctness": 1.0}, 40) as scorer:
        yield scorer


def scored(scorer, config: WarmupConfig, count: int = 60):
    draw = random.Random(0)
    for problem in problems("train", count):
        trace = parse(demonstrate(problem, draw, config))
        yield problem, trace, scorer.score(problem, trace)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_splits_share_no_question_whatever_the_seed():
    heldout = {p.question for seed in (0, 1) for p in problems("heldout", 200, seed)}
    assert len(heldout) > 200
    for seed in (0, 1):
        assert not heldout & {p.question for p in problems("train", 1500, seed)}


def test_problems_are_reproducible_and_differ_by_seed():
    assert problems("train", 50, seed=1) == problems("train", 50, seed=1)
    assert problems("train", 50, seed=1) != problems("train", 50, seed=2)


def test_an_impossible_count_is_one_clear_line():
    with pytest.raises(UserError, match="only about"):
        problems("heldout", 10**6)


def test_every_problem_is_solved_in_three_different_ways_and_each_step_holds():
    for problem in problems("train", 800):
        ways = workings(problem)
        assert len({way.method for way in ways}) == 3
        assert len({tuple(step.left for step in way.steps) for way in ways}) == 3
        for way in ways:
            assert way.steps[-1].value == Fraction(problem.answer)
            for step in way.steps:
                (equation,) = find_equations(normalise(f"{step.left}={step.value}"))
                assert equation.holds


def test_what_is_recited_stands_in_the_question_and_works_nothing_out():
    for problem in problems("train", 200):
        recited = normalise(givens(problem))
        assert set(numbers(recited)) == set(numbers(normalise(problem.question)))
        assert find_equations(recited) == []


def test_honest_demonstrations_are_right_exact_and_three_ways(scorer):
    for _, trace, card in scored(scorer, HONEST):
        assert is_exact_layout(trace)
        assert card.rewards["correctness"].value == 1.0
        assert card.rewards["competition_format"].value == 1.0
        assert card.facts["judge/right"] is True
        assert all(card.facts[f"right/{name}"] for name in FIGHTERS)
        assert not card.unscored


def test_loose_demonstrations_keep_their_tags_in_order(scorer):
    loose = dataclasses.replace(HONEST, loose_layout=1.0)
    formats = []
    for _, trace, card in scored(scorer, loose):
        assert tags_in_order(trace)
        assert card.rewards["correctness"].value == 1.0
        formats.append(card.rewards["competition_format"].value)
    assert 0.5 in formats


def test_copies_are_less_original_than_honest_work(scorer):
    def originality(config):
        return mean(
            card.rewards[f"originality_{name}"].value
            for *_, card in scored(scorer, config)
            for name in ("knight", "viking")
        )

    assert originality(dataclasses.replace(HONEST, copying=1.0)) < originality(HONEST) - 0.3


def test_mistakes_are_mended_or_passed_over_and_the_judge_is_right(scorer):
    cards = [card for *_, card in scored(scorer, dataclasses.replace(HONEST, mistakes=0.4), 200)]
    assert all(card.rewards["correctness"].value == 1.0 and card.facts["judge/right"] for card in cards)
    wrong = [not card.facts[f"right/{name}"] for card in cards for name in FIGHTERS]
    mended = [card.rewards[f"reflection_{name}"].value > 0.3 for card in cards for name in FIGHTERS]
    assert 0.2 < mean(wrong) < 0.4
    assert 0.05 < mean(mended) < 0.2


def test_the_judge_works_out_what_each_fighter_ends_with_before_it_names_one(scorer):
    """What a model learns to say must be true, and stand in the fighters' blocks: else it would learn to guess."""
    wrong = 0
    for _, trace, card in scored(scorer, dataclasses.replace(HONEST, mistakes=0.4), 200):
        ruling = trace.block_text("result") or ""
        said = re.findall(r"The (\w+) ends with [\w ]+: (\d+)([-+*/])(\d+)=(\d+), (right|wrong)\.", ruling)
        assert tuple(name for name, *_ in said) == FIGHTERS
        for name, a, sign, b, value, verdict in said:
            worked = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) // int(b)}[sign]
            assert worked == int(value) and f"{a}{sign}{b}=" in (trace.block_text(name) or "")
            assert (verdict == "right") == card.facts[f"right/{name}"]
            wrong += verdict == "wrong"
        assert f"I name the {card.facts['winner']}." in ruling
        assert card.rewards["judge_reasoning"].value == 1.0
    assert wrong > 100


def test_a_fighter_that_errs_has_mostly_stopped_a_step_too_early(scorer):
    early, wrong = 0, 0
    for problem, trace, card in scored(scorer, dataclasses.replace(HONEST, mistakes=0.4), 200):
        between = {str(step.value) for way in workings(problem) for step in way.steps[:-1]}
        for name in FIGHTERS:
            if not card.facts[f"right/{name}"]:
                wrong += 1
                early += (trace.block_text(name) or "").rstrip(" .\n").split()[-1] in between
    assert early > 0.7 * wrong > 0
