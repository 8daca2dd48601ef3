"""How weights lie to be sampled from: over the mesh, in memory, in which dtype; and the programs that lay them so."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from pkv.mesh import SAMPLING_RULES, shardings
from pkv.model import Arch, Params, cast, weight_axes
from pkv.model.kernels import LANES


class Laying(NamedTuple):
    """What becomes of an array of weights: its dtype, its place, and how often each key-value head stands.

    place: with the order of the axes in memory, if it isn't the compiler's own choice. heads: their axis, None where an
    array has none.
    """

    dtype: Any
    place: Format
    heads: int | None
    repeats: int


class Lay:
    """Arrays of weights in the layout of sampling: a program for each way and shape.

    arch: with its key-value heads `repeats` times. mesh: of all hosts; the weights lie alike on each.
    """

    def __init__(self, arch: Arch, repeats: int, dtype: Any, mesh: Mesh) -> None:
        self._arch, self._repeats, self._dtype, self._mesh = arch, repeats, dtype, mesh
        self._ways: dict[Laying, Any] = {}

    def __call__(self, array: jax.Array, how: Laying) -> jax.Array:
        return self._way(how)(array)

    def lower(self, array: jax.ShapeDtypeStruct, how: Laying) -> jax.stages.Lowered:
        """The program before it is compiled."""
        return self._way(how).lower(array)

    def placing(self, params: Params) -> Any:
        """Where the arrays lie."""
        return shardings(weight_axes(params, self._arch), self.shapes(params), self._mesh, SAMPLING_RULES)

    def ways(self, params: Params) -> list[Laying]:
        """What becomes of every array; shapes and dtypes suffice."""
        axes = jax.tree.leaves(weight_axes(params, self._arch), is_leaf=_is_axes)
        both = zip(jax.tree.leaves(self.shapes(params)), jax.tree.leaves(self.placing(params)), strict=True)
        return [
            Laying(laid.dtype, _in_memory(laid.shape, place), _heads(names), self._repeats)
            for names, (laid, place) in zip(axes, both, strict=True)
        ]

    def shapes(self, params: Params) -> Any:
        """Shapes and dtypes of the arrays as they are laid."""

        def repeated(names: tuple[str, ...], array: jax.Array) -> jax.Array:
            return _repeated(array, _heads(names), self._repeats)

        axes = weight_axes(params, self._arch)
        laid = lambda params: jax.tree.map(repeated, axes, cast(params, self._dtype), is_leaf=_is_axes)  # noqa: E731
        return jax.eval_shape(laid, params)

    def _way(self, how: Laying) -> Any:
        if how not in self._ways:
            self._ways[how] = jax.jit(partial(_lay, how=how), out_shardings=how.place)
        return self._ways[how]

    def _cache_size(self) -> int:
        return sum(way._cache_size() for way in self._ways.values())


def _lay(array: jax.Array, how: Laying) -> jax.Array:
    return _repeated(array, how.heads, how.repeats).astype(how.dtype)


def _repeated(array: jax.Array, heads: int | None, repeats: int) -> jax.Array:
    return array if heads is None or repeats == 1 else jnp.repeat(array, repeats, heads)


def _heads(names: tuple[str, ...]) -> int | None:
    return names.index("kv_heads") if "kv_heads" in names else None


def _in_memory(shape: tuple[int, ...], place: NamedSharding) -> Format:
    """Row by row where a device's rows don't fill whole registers: to save the padding XLA would turn such an array on
    TPU, and every segment would copy it back."""
    ragged = len(shape) > 1 and place.shard_shape(shape)[-1] % LANES
    return Format(Layout(tuple(range(len(shape)))) if ragged else None, place)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
