"""How far pkv's decoder is from what a torch model said: the numbers that the tests bound and the benchmark prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden.make import FAR, NEW_TOKENS, ROW
from safetensors.numpy import load_file

from pkv.model import Arch, Params, forward, init_cache, load_params, logits, read_arch, read_config, save_params


def read(directory: Path) -> tuple[Params, Arch]:
    """A checkpoint's weights in 32 bits, and its Arch for rows about as long as those of the answers."""
    arch = read_arch(directory)
    return load_params(directory, arch), arch.for_context(ROW + NEW_TOKENS)


def compare(directory: Path, said: dict[str, Any]) -> dict[str, float]:
    """By check: the largest difference of logits over the largest logit, near and far; the share of greedy tokens that
    differ; the relative difference of the loss; that of the gradient, the worst of all tensors."""
    params, arch = read(directory)
    tokens = jnp.asarray(said["tokens"])
    far = said["far_logits"].shape[1]
    row = jnp.arange(tokens.shape[1])
    loss, gradients = loss_and_gradients(params, arch, tokens, directory)
    return {
        "logits": difference(run(params, arch, tokens, row), said["logits"]),
        "far logits": difference(
            run(params, arch.for_context(FAR), tokens[:, :far], FAR + row[:far]), said["far_logits"]
        ),
        "greedy": float(np.mean(continuations(params, arch, tokens, said["lengths"]) != said["greedy"])),
        "loss": abs(float(loss) / float(said["loss"]) - 1),
        "gradient": worst(gradients, said),
    }


def difference(got: Any, expected: np.ndarray) -> float:
    """The largest, relative to the largest number there is."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def worst(gradients: dict[str, np.ndarray], said: dict[str, Any]) -> float:
    if "gradients" in said:
        assert gradients.keys() == said["gradients"].keys()
        return max(difference(gradients[name], expected) for name, expected in said["gradients"].items())
    assert sorted(gradients) == list(said["gradient_names"])
    lengths = zip(said["gradient_names"], said["gradient_lengths"], strict=True)
    return max(abs(float(np.linalg.norm(gradients[name]) / length) - 1) for name, length in lengths)


@partial(jax.jit, static_argnums=1)
def run(params: Params, arch: Arch, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    hidden, _ = forward(params, arch, tokens, jnp.broadcast_to(positions, tokens.shape))
    return logits(params, arch, hidden)


def loss_and_gradients(
    params: Params, arch: Arch, tokens: jax.Array, directory: Path
) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Mean cross-entropy, and its gradient by tensor: written and read as the weights are, it lies as torch's does."""

    @jax.jit
    @jax.value_and_grad
    def total(params: Params) -> jax.Array:
        chances = jax.nn.log_softmax(run(params, arch, tokens, jnp.arange(tokens.shape[1]))[:, :-1])
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()

    loss, gradients = total(params)
    with TemporaryDirectory() as out:
        source = read_config(directory)
        save_params(gradients, read_arch(directory), Path(out) / "gradients", source)
        return loss, load_file(Path(out) / "gradients" / "model.safetensors")


def continuations(params: Params, arch: Arch, tokens: jax.Array, lengths: np.ndarray) -> jax.Array:
    """Greedy tokens [2, NEW_TOKENS] after prompts of unequal length, which are padded on the right."""
    longest = int(max(lengths))
    lengths = jnp.asarray(lengths)

    @jax.jit
    def decode(params: Params) -> jax.Array:
        prompt = tokens[:, :longest]
        positions = jnp.broadcast_to(jnp.arange(longest), prompt.shape)
        cache = init_cache(arch, len(prompt), longest + NEW_TOKENS)
        hidden, cache = forward(params, arch, prompt, positions, cache=cache)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            hidden, position, cache = carry
            token = logits(params, arch, hidden).argmax(-1)
            hidden, cache = forward(params, arch, token, position[:, None], cache=cache)
            return (hidden, position + 1, cache), token[:, 0]

        return jax.lax.scan(step, (last, lengths, cache), length=NEW_TOKENS)[1].T

    return decode(params)
