"""A policy from anywhere: what its directory must hold, and that it is the same one each time."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer as Backend

from pkv.competition import train_tokenizer
from pkv.config import MeshConfig, UserError
from pkv.evaluate import load_policy
from pkv.mesh import make_mesh
from pkv.model import Arch, init_params, save_params

ARCH = Arch(vocab_size=265, hidden=8, layers=1, heads=2, kv_heads=2, head_size=4, ffn=8, qkv_bias=True)


@pytest.fixture
def model(tmp_path) -> Path:
    """A model whose embedding ends where its tokenizer does."""
    train_tokenizer(["How many hives?"], 265, tmp_path / "model")
    save_params(init_params(ARCH, jax.random.key(0)), ARCH, tmp_path / "model")
    return tmp_path / "model"


def load(source):
    return load_policy(str(source), make_mesh(MeshConfig()))


def test_a_tokenizer_may_have_control_tokens_behind_the_embedding_but_no_text(model):
    backend = Backend.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(["<image>"])
    backend.save(str(model / "tokenizer.json"))
    assert load(model).tokenizer.vocab_size == ARCH.vocab_size + 1 == backend.get_vocab_size()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 264}))
    with pytest.raises(UserError, match="the tokenizer's text takes 265 ids, the model holds only 264"):
        load(model)
