"""Low-rank adapters and frozen weights over a whole tree of weights: made, laid out, taken apart and put together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pkv.config import LoraConfig
from pkv.mesh import TRAINING_RULES, fold, shardings
from pkv.model.arch import Arch
from pkv.model.layout import by_path
from pkv.model.linear import Adapted, Quantised, quantise
from pkv.model.weights import Params, param_axes, param_shapes

# The layers' matrices, and how many axes after L are inputs.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def init_adapters(arch: Arch, config: LoraConfig, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Fresh adapters for `join`, which change nothing yet: A uniform within 1/sqrt(inputs), B zero, float32.

    Each A is drawn from the key and the weight's name; None stands where a weight gets no adapter.
    """

    def fresh(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Adapted | None:
        name, (L, *sizes) = path[-1].key, shape.shape
        if name not in config.targets:
            return None
        inputs, outputs = sizes[: INPUTS[name]], sizes[INPUTS[name] :]
        bound = math.prod(inputs) ** -0.5
        draw = fold(key, jax.tree_util.keystr(path, simple=True, separator="."))
        a = jax.random.uniform(draw, (L, *inputs, config.rank), minval=-bound, maxval=bound)
        return Adapted(None, a, jnp.zeros((L, config.rank, *outputs)), config.alpha / config.rank)

    def make() -> Params:
        return jax.tree_util.tree_map_with_path(fresh, param_shapes(arch))

    shapes = jax.eval_shape(make)
    placed = None if mesh is None else shardings(weight_axes(shapes, arch), shapes, mesh, TRAINING_RULES)
    return jax.jit(make, out_shardings=placed)()


def freezer(
    arch: Arch, base: Literal["plain", "int8", "nf4"], mesh: Mesh | None = None
) -> Callable[[str, jax.Array], Any]:
    """What becomes of each weight that is frozen, given its path and array; see `LoraConfig.base`."""
    axes = by_path(param_axes(arch))

    def keep(path: str, weight: jax.Array) -> Any:
        if base == "plain" or path.rpartition(".")[2] not in INPUTS:
            return weight
        encode = partial(quantise, axis=INPUTS[path.rpartition(".")[2]] - weight.ndim, kind=base)  # along the inputs
        shapes = jax.eval_shape(encode, weight)
        placed = None
        if mesh is not None:
            placed = shardings({path: _axes_of(axes[path], shapes)}, {path: shapes}, mesh, TRAINING_RULES)[path]
        return jax.jit(encode, out_shardings=placed)(weight)

    return keep


def split(params: Params) -> tuple[Params, Params | None]:
    """What is trained and what is frozen, with no array copied: the adapters and their base, or everything and None.

    The base is the model without its adapters: a reference model at no memory of its own.
    """
    if not any(map(_is_adapted, jax.tree.leaves(params, is_leaf=_is_adapted))):
        return params, None

    def adapter(node: Any) -> Adapted | None:
        return dataclasses.replace(node, base=None) if _is_adapted(node) else None

    def base(node: Any) -> Any:
        return node.base if _is_adapted(node) else node

    return jax.tree.map(adapter, params, is_leaf=_is_weight), jax.tree.map(base, params, is_leaf=_is_weight)


def join(trained: Params, frozen: Params | None) -> Params:
    """The whole model again, with no array copied; the inverse of `split`."""
    if frozen is None:
        return trained

    def whole(adapter: Adapted | None, base: Any) -> Any:
        return base if adapter is None else dataclasses.replace(adapter, base=base)

    return jax.tree.map(whole, trained, frozen, is_leaf=lambda node: node is None or _is_adapted(node))


def weight_axes(params: Params, arch: Arch) -> Any:
    """The logical axes of every array of weights, of adapters, or of both together.

    A carries its weight's input axes and B its output axes, so that they lie where the weight does.
    """
    return jax.tree.map(_axes_of, param_axes(arch), params, is_leaf=_is_axes)


def _axes_of(axes: tuple[str, ...], weight: Any) -> Any:
    if weight is None:
        return None
    if isinstance(weight, Quantised):
        at = len(axes) + weight.axis + 1
        return Quantised((*axes[:at], "block", *axes[at:]), axes, weight.axis)
    if _is_adapted(weight):
        inputs = weight.a.ndim - 1
        a, b = (*axes[:inputs], "rank"), (axes[0], "rank", *axes[inputs:])
        return Adapted(_axes_of(axes, weight.base), a, b, weight.scale)
    return axes


def _is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def _is_weight(node: Any) -> bool:
    return isinstance(node, (Adapted, Quantised))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)
