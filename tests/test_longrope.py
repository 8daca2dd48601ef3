"""Longrope: what fits the original window turns by the short factors, in training and in every command after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from pkv.competition import train_tokenizer
from pkv.config import SamplingConfig, parse_config
from pkv.evaluate.answering import open_model, sample
from pkv.export import export
from pkv.model import Arch, init_params, read_arch, save_params
from pkv.model.families import FAMILIES
from pkv.model.rope import LongRope
from pkv.train.setup import build, open_training

WINDOW, CONTEXT = 512, 1024
SCALING = LongRope((1.0,) * 4, (1.5, 4.0, 9.0, 16.0), WINDOW, 1.0, True)
ARCH = Arch(
    vocab_size=400,
    hidden=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_size=8,
    ffn=48,
    rope_scaling=SCALING,
    max_positions=CONTEXT,
    init_std=0.3,
)
SHORT = dataclasses.replace(SCALING, long_context=False)
ALONE = {"short": SHORT, "long": dataclasses.replace(SHORT, short_factors=SCALING.long_factors)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The same weights with both lists of factors, and with either list alone."""
    root = tmp_path_factory.mktemp("models")
    params = init_params(ARCH, jax.random.key(0))
    alone = {n: dataclasses.replace(ARCH, rope_scaling=each, max_positions=WINDOW) for n, each in ALONE.items()}
    for name, arch in {"both": ARCH, **alone}.items():
        train_tokenizer(["How many hives?"], 300, root / name)
        save_params(params, arch, root / name, FAMILIES["phi3"].write(arch))
    return {name: root / name for name in ("both", *alone)}


def said(model: Path, new_tokens: int) -> list[float]:
    line = {"id": "q", "prompt": "How many hives?", "raw": True}
    return next(sample(str(model), [line], max_new_tokens=new_tokens, sampling=SamplingConfig(segment=8)))["logprobs"]


def test_a_command_takes_the_factors_of_its_longest_row(models):
    np.testing.assert_allclose(said(models["both"], 16), said(models["short"], 16), atol=1e-6)
    beyond = said(models["both"], WINDOW)[:16]
    np.testing.assert_allclose(beyond, said(models["long"], 16)[: len(beyond)], atol=1e-5)
    assert np.abs(np.subtract(said(models["short"], 16)[:4], beyond[:4])).max() > 1e-2


@pytest.mark.parametrize(("rows", "long"), [(WINDOW, False), (WINDOW + 1, True)])
def test_a_run_takes_those_of_its_rows_and_keeps_them(models, tmp_path, rows, long):
    """In training, in a command that answers shortly, and its export says what the base said."""
    raw = {
        "model": {"path": str(models["both"])},
        "prompt": {"system": "brief"},
        "evaluate": {"problems": 1},
        "grpo": {"row_tokens": rows},
        "rounds": [{"name": "only", "steps": 1, "max_new_tokens": 8, "weights": {"correctness": 1.0}}],
    }
    setup = build(parse_config(raw))
    parts = setup.engine, setup.heldout_engine, setup.learner
    engine, heldout, learner = parts
    archs = engine.programs.arch, heldout.programs.arch, learner._arch
    assert archs == (ARCH.for_context(rows),) * 3
    run, state = open_training(setup, tmp_path / "run", fresh=False)
    run.save(1, state, keep=1)
    responder = open_model(str(tmp_path / "run"), SamplingConfig())
    assert responder.source_for(16).engine.programs.arch.rope_scaling.long_context == long
    assert responder.source_for(WINDOW + 1).engine.programs.arch.rope_scaling.long_context
    assert read_arch(export(str(tmp_path / "run"), tmp_path / "out")) == ARCH
