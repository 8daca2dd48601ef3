"""pkv's decoder says what transformers' torch model says: against golden files everywhere, live where torch is."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_qwen2 import NEW_TOKENS, answers, make_model

from pkv.model import forward, init_cache, load_params, logits, read_arch, save_params

GOLDEN = Path(__file__).parent / "golden" / "qwen2"
CASES = ["golden"]
if importlib.util.find_spec("torch"):
    CASES += ["untied", "tied", "no grouping"]
CHANGES = {"tied": {"tie_word_embeddings": True}, "no grouping": {"num_key_value_heads": 4}}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint directory with what its torch model answers."""
    if request.param == "golden":
        with np.load(GOLDEN / "answers.npz") as file:
            return GOLDEN, dict(file)
    directory = tmp_path_factory.mktemp("qwen2")
    model = make_model(seed=7, **CHANGES.get(request.param, {}))
    model.save_pretrained(directory)
    return directory, answers(model, seed=8)


def test_logits_equal_those_of_transformers(case):
    directory, expected = case
    arch = read_arch(directory)
    tokens = jnp.asarray(expected["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params = load_params(directory, arch)
    got = logits(params, arch, forward(params, arch, tokens, positions)[0])
    scale = np.abs(expected["logits"]).max()
    assert scale > 1  # a model that says nothing would agree with everything
    np.testing.assert_allclose(got, expected["logits"], atol=1e-4 * scale, rtol=0)


def test_greedy_continuations_of_unequal_prompts_equal_those_of_transformers(case):
    directory, expected = case
    arch = read_arch(directory)
    params = load_params(directory, arch)
    lengths = jnp.asarray(expected["lengths"])
    longest = int(lengths.max())

    @jax.jit
    def decode(params):
        prompt = jnp.asarray(expected["tokens"])[:, :longest]
        positions = jnp.broadcast_to(jnp.arange(longest), prompt.shape)
        cache = init_cache(arch, len(prompt), longest + NEW_TOKENS)
        hidden, cache = forward(params, arch, prompt, positions, cache=cache)  # padded on the right
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)

        def step(carry, _):
            hidden, position, cache = carry
            token = logits(params, arch, hidden).argmax(-1)
            hidden, cache = forward(params, arch, token, position[:, None], cache=cache)
            return (hidden, position + 1, cache), token[:, 0]

        return jax.lax.scan(step, (last, lengths, cache), length=NEW_TOKENS)[1].T

    np.testing.assert_array_equal(decode(params), expected["greedy"])


@pytest.mark.skipif("tied" not in CASES, reason="needs torch")
def test_an_export_says_the_same_in_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    with np.load(GOLDEN / "answers.npz") as file:
        expected = dict(file)
    arch = read_arch(GOLDEN)
    save_params(load_params(GOLDEN, arch), arch, tmp_path)  # its config.json is made from the Arch alone
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        got = model(torch.tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(got, expected["logits"], atol=1e-4 * np.abs(expected["logits"]).max(), rtol=0)
