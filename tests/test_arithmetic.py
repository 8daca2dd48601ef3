"""The model's own arithmetic by hand, and against what XLA counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pkv.model import Arch, forward, init_params, logits, unstack_layers
from pkv.model.arithmetic import crossover, forward_flops, peak_flops, update_flops

ARCH = Arch(vocab_size=50, hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, ffn=32)
# Of a layer: queries and outputs 16 x 32 each, keys and values 16 x 16 each, three feed-forward matrices 16 x 32.
MATRICES = 2 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32)


def test_a_forward_pass_by_hand():
    # Three tokens see 1 + 2 + 3 keys, in 2 layers, with 4 heads of 8; two of them are predicted.
    wanted = 2 * MATRICES * 3 + 2 * 2 * 16 * 50 + 2 * 4 * 32 * 6
    assert forward_flops(ARCH, [(3, 2)]) == wanted
    assert update_flops(ARCH, [(3, 2)], frozen=False) == 3 * wanted
    assert update_flops(ARCH, [(3, 2)], frozen=True) == 2 * wanted


def test_a_window_bounds_what_local_layers_see():
    local = dataclasses.replace(ARCH, window=2, local_layers=(True, False))
    assert forward_flops(ARCH, [(4, 0)]) - forward_flops(local, [(4, 0)]) == 4 * 32 * (10 - 7)


def test_at_the_crossover_attention_is_as_much_work_as_the_matrices():
    T = round(crossover(ARCH))
    attention = forward_flops(ARCH, [(T, 0)]) - 2 * MATRICES * T
    assert attention == pytest.approx(2 * MATRICES * T, rel=2 / T)


def test_xla_counts_as_many_operations():
    arch = dataclasses.replace(ARCH, hidden=64, ffn=256, vocab_size=512)
    params = unstack_layers(init_params(arch, jax.random.key(0)), arch)

    def run(params, tokens_BT):
        hidden, _ = forward(params, arch, tokens_BT, jnp.zeros_like(tokens_BT))
        return logits(params, arch, hidden)

    tokens = jnp.zeros((1, 64), jnp.int32)
    counted = jax.jit(run).lower(params, tokens).compile().cost_analysis()["flops"]
    # Besides, XLA counts norms, softmax and rotary tables, and whole squares of scores.
    assert forward_flops(arch, [(64, 64)]) < counted < 1.25 * forward_flops(arch, [(64, 64)])


def test_peaks_are_known_by_what_jax_calls_the_chips():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
