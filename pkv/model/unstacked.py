"""Weights of a small model as it decodes fastest: layer by layer, and on a CPU output by output."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from pkv.model.arch import Arch
from pkv.model.linear import Adapted, ByOutput, Flat, Quantised
from pkv.model.lora import INPUTS
from pkv.model.weights import Params

MATRICES = {**INPUTS, "unembedding": 1}  # and how many of their axes are inputs
BY_HEAD = ("q", "k", "v", "q_bias", "k_bias", "v_bias")  # whose last axes are heads and their sizes


def unstack_layers(params: Params, arch: Arch) -> Params:
    """The same weights with "layers" as a tuple of L per-layer trees, which `forward` unrolls.

    Small models decode faster this way, because a scan slices every stacked weight in every step.
    """
    layers = tuple(jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(arch.layers))
    return {**params, "layers": layers}


def lay_by_output(params: Params, banks: int = 1) -> Params:
    """Unstacked weights, or a part of them from `split`, with every matrix as a `ByOutput` that isn't one of its own.

    banks: parts of each layer's heads whose projections are products of their own (see `model.pages.Stock`): a core
    goes on with the bank whose product it has done, as XLA gives it whole chains of what follows from one another.
    The embeddings stay, which lie so anyway: see `tied_scores`.
    """

    def laid(path: tuple[Any, ...], w: Any) -> Any:
        if isinstance(w, Adapted):
            return dataclasses.replace(w, base=laid(path, w.base))
        inputs = MATRICES.get(path[-1].key)
        return w if w is None or inputs is None or isinstance(w, Quantised | Flat) else ByOutput.of(w, inputs)

    layers = tuple({**layer, "attention": _in_banks(layer["attention"], banks)} for layer in params["layers"])
    return jax.tree_util.tree_map_with_path(laid, {**params, "layers": layers}, is_leaf=_is_whole)


def _in_banks(attention: Params, banks: int) -> Params:
    """A layer's attention, with what makes queries, keys and values in a tuple of banks, each with some heads."""
    if banks == 1:
        return attention

    def bank(number: int, name: str, weight: Any) -> Any:
        part = lambda array: jnp.split(array, banks, axis=-2)[number]  # noqa: E731
        if isinstance(weight, Adapted):
            return dataclasses.replace(weight, base=bank(number, name, weight.base), b=part(weight.b))
        if isinstance(weight, Flat):
            return weight.bank(number, banks)
        return jax.tree.map(part, weight) if name in BY_HEAD else weight

    projections = {name: weight for name, weight in attention.items() if name != "o"}
    each = [{name: bank(n, name, weight) for name, weight in projections.items()} for n in range(banks)]
    return {"o": attention["o"], "banks": tuple(each)}


def _is_whole(node: Any) -> bool:
    return isinstance(node, Adapted | Quantised | Flat)


def tied_scores(embedding: jax.Array | None) -> Params:
    """Tied embeddings, None in a part without them, as what `logits` multiplies with; no copy."""
    return {"unembedding": None if embedding is None else ByOutput(embedding, embedding.shape[:1])}
