"""Weights of a small model as it decodes fastest: layer by layer, and on a CPU output by output."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax

from pkv.model.arch import Arch
from pkv.model.linear import Adapted, ByOutput, Quantised
from pkv.model.lora import INPUTS
from pkv.model.weights import Params

MATRICES = {**INPUTS, "unembedding": 1}  # and how many of their axes are inputs


def unstack_layers(params: Params, arch: Arch) -> Params:
    """The same weights with "layers" as a tuple of L per-layer trees, which `forward` unrolls.

    Small models decode faster this way, because a scan slices every stacked weight in every step.
    """
    layers = tuple(jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(arch.layers))
    return {**params, "layers": layers}


def lay_by_output(params: Params) -> Params:
    """Unstacked weights, or a part of them from `split`, with every matrix as a `ByOutput`, but for quantised ones.

    The embeddings stay, which lie so anyway: see `tied_scores`.
    """

    def laid(path: tuple[Any, ...], w: Any) -> Any:
        if isinstance(w, Adapted):
            return dataclasses.replace(w, base=laid(path, w.base))
        inputs = MATRICES.get(path[-1].key)
        return w if w is None or inputs is None or isinstance(w, Quantised) else ByOutput.of(w, inputs)

    whole = lambda node: isinstance(node, (Adapted, Quantised))  # noqa: E731
    return jax.tree_util.tree_map_with_path(laid, params, is_leaf=whole)


def tied_scores(embedding: jax.Array | None) -> Params:
    """Tied embeddings, None in a part without them, as what `logits` multiplies with; no copy."""
    return {"unembedding": None if embedding is None else ByOutput(embedding, embedding.shape[:1])}
