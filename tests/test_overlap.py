"""Scoring never holds up the device: rollouts go on being sampled while no score is there yet."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest
from tiny_sampling import one_device

from pkv.competition import Tokenizer, train_tokenizer
from pkv.config import GrpoConfig, RewardConfig, SamplingConfig
from pkv.data.arithmetic import problems
from pkv.evaluate import render_prompts, sample_groups
from pkv.evaluate.groups import Source
from pkv.model import Arch, init_params
from pkv.rewards import ScoringPool
from pkv.sampling import Engine
from pkv.tracking import Clock
from pkv.train import rollouts

WAITING = """
import pathlib, time

def waits(problem, trace):
    while not pathlib.Path({path!r}).exists():
        time.sleep(0.01)
    return 1.0

def rewards():
    return {{"waits": ("trace", waits)}}
"""


def test_all_rollouts_are_sampled_while_the_first_is_still_being_scored(tmp_path):
    """The reward ends when the file is there, which is written once sampling is over: else it runs out of time."""
    go, reward = tmp_path / "go", tmp_path / "waits.py"
    reward.write_text(WAITING.format(path=str(go)))
    train_tokenizer([problem.question for problem in problems("train", 50)], 300, tmp_path / "model")
    tokenizer = Tokenizer.load(str(tmp_path / "model"))
    arch = Arch(vocab_size=400, hidden=16, layers=1, heads=2, kv_heads=2, head_size=8, ffn=32, max_positions=1024)
    engine = Engine(arch, SamplingConfig(slots=2, segment=4), tokenizer.stop_ids, one_device())
    source = Source(engine, engine.load(init_params(arch, jax.random.key(0))), tokenizer)
    prompts = render_prompts(tokenizer, problems("train", 2), "Answer.")
    config = RewardConfig(workers=1, user_files=(str(reward),), timeout_s=120.0)
    with ScoringPool({"waits": 1.0}, 64, config) as scoring:
        asked = {"samples": 3, "max_new_tokens": 12, "seed": 0, "purpose": "train"}
        sampled = sample_groups(source, prompts, scoring=scoring, **asked)
        waiting = [score for group in sampled.scores for score in group]
        assert len(waiting) == 6 and not any(score.done() for score in waiting)
        go.touch()
        groups = sampled.scored()
    assert [card.rewards["waits"].value for group in groups for card in group.cards] == [1.0] * 6


@pytest.mark.parametrize("one_step_off", [True, False])
def test_one_step_off_the_next_rollouts_are_sampled_before_these_scores_are_waited_for(monkeypatch, one_step_off):
    said = []

    def sample(source, prompts, **_):
        step = source["step"]
        said.append(f"sample {step}")
        return SimpleNamespace(scored=lambda _: said.append(f"score {step}") or [], rollouts=[])

    monkeypatch.setattr(rollouts, "sample_groups", sample)
    monkeypatch.setattr(rollouts.dataclasses, "replace", lambda source, step: {"step": step})
    setup = SimpleNamespace(
        source=lambda *_: SimpleNamespace(weights={}),
        draw_prompts=lambda step, *_: [],
        grpo=GrpoConfig(prompts=0, refills=0, one_step_off=one_step_off),
        config=SimpleNamespace(seed=0),
    )
    stage = SimpleNamespace(required_round=SimpleNamespace(samples=0), weights={}, budget=lambda _: 8, stop=3)
    run = SimpleNamespace(waiting=None, pass_rates=dict, step=0)
    for step in range(3):
        rollouts.gather(setup, run, None, stage, step, None, Clock())
    if one_step_off:
        assert said == ["sample 0", "sample 1", "score 0", "sample 2", "score 1", "score 2"]
    else:
        assert said == ["sample 0", "score 0", "sample 1", "score 1", "sample 2", "score 2"]
