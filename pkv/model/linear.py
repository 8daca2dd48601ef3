"""A linear layer and what its weight may be: an array, a frozen array in few bits, or either with a low-rank adapter.

`Quantised` and `Adapted` are pytrees, and each stands for one array: `w[layer]` and `w.astype(dtype)` do what they do
on an array. The first axis of a stacked one is L, of every array inside. `ByOutput` and `Flat` are what sampling makes
of an array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

BLOCK = 64  # numbers that share a scale
# The normal distribution's quantiles, scaled to [-1, 1], with an exact 0 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["axis"])
@dataclass(frozen=True, eq=False)
class Quantised:
    """A frozen array in blocks of up to 64 numbers along one axis, of size D; a block's scale is its largest size.

    codes: int8 [..., D/64, 64, ...], or uint8 [..., D/64, 32, ...] with two codes in a byte, the block's first half in
    the low bits. scales: float32 [..., D/64, ...]. axis: where D stands in the array, counted from the end.
    """

    codes: Any
    scales: Any
    axis: int

    @property
    def ndim(self) -> int:
        return self.scales.ndim

    def __getitem__(self, layer: Any) -> Quantised:
        return jax.tree.map(lambda array: array[layer], self)

    def astype(self, dtype: Any) -> jax.Array:
        """The array, off by at most scale / 254 (int8) or 0.152 scale (nf4, half of its widest gap)."""
        if self.codes.dtype == jnp.int8:
            values, scales = self.codes.astype(jnp.float32), self.scales / 127
        else:
            values = _nf4_values(jnp.concatenate([self.codes & 15, self.codes >> 4], axis=self.axis))
            scales = self.scales
        at = self.ndim + self.axis
        shape = (*scales.shape[:at], -1, *scales.shape[at + 1 :])
        return (values * jnp.expand_dims(scales, at + 1)).reshape(shape).astype(dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True, eq=False)
class Adapted:
    """base + scale · A B, which training and sampling never form (LoRA, arXiv 2106.09685, equation 3).

    base: [*in, *out], an array or Quantised, frozen. a: float32 [*in, R]. b: float32 [R, *out].
    """

    base: Any
    a: Any
    b: Any
    scale: float

    def __getitem__(self, layer: Any) -> Adapted:
        return jax.tree.map(lambda array: array[layer], self)

    def astype(self, dtype: Any) -> jax.Array:
        """A new array with the adapter merged in, added in 32 bits: for export, one weight at a time."""
        product = partial(jnp.tensordot, axes=1, precision="highest")
        if self.a.ndim + self.b.ndim > self.base.ndim + 2:
            product = jax.vmap(product)  # over L
        return (self.base.astype(jnp.float32) + self.scale * product(self.a, self.b)).astype(dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["out"])
@dataclass(frozen=True, eq=False)
class ByOutput:
    """An array [*in, *out] that lies output by output, for products with few tokens on a CPU.

    rows: [out, in], the axes of each in one. out: their sizes. XLA's CPU compiler packs a product's second array anew
    each time. Here that is the tokens: 24 times 512 by 2,048 and back took 16.8 ms for 21.5, 4 times 9.9 for 13.1.
    """

    rows: Any
    out: tuple[int, ...]

    @classmethod
    def of(cls, w: jax.Array, inputs: int = 1) -> ByOutput:
        """w: [*in, *out], where `in` is the first `inputs` axes."""
        return cls(w.reshape(math.prod(w.shape[:inputs]), -1).T, w.shape[inputs:])

    def times(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """x [..., in] times the array, in `dtype`: [..., *out]."""
        return self.turned(self.columns(x, dtype), x.shape[:-1])

    def columns(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """The same as the product gives it, a column for each of the M tokens: [out, M]."""
        flat = x.reshape(-1, x.shape[-1])
        return jnp.einsum("oi,mi->om", self.rows.astype(x.dtype), flat, preferred_element_type=dtype)

    def turned(self, columns: jax.Array, lead: tuple[int, ...]) -> jax.Array:
        """Columns [out, M] as [*lead, *out]."""
        # Without the barrier XLA turns the product round, so that the tokens come first and the weights are packed.
        return jax.lax.optimization_barrier(columns).T.reshape(*lead, *self.out)


@partial(jax.tree_util.register_dataclass, data_fields=["table", "steps"], meta_fields=["out"])
@dataclass(frozen=True, eq=False)
class Flat:
    """An array [*in, *out] as a product takes it, the axes of each in one; perhaps in 8 bits.

    table: [in, out], or int8, off by at most half a step. steps: None, or float32 [out], the same for all that an
    output sums, so it comes after the sum. out: their sizes. With a layer's heads and their sizes as two axes, XLA's
    compiler for TPU takes the layer out of its stack before the product, and turns it round; with one axis the product
    reads it where it lies, and converts 8 bits on the way (benchmarks/flat.py).
    """

    table: Any
    steps: Any
    out: tuple[int, ...]

    @classmethod
    def of(cls, w: jax.Array, inputs: int, dtype: Any, *, eight_bit: bool = False) -> Flat:
        """w: all layers', [L, *in, *out], where `in` is `inputs` axes."""
        out = w.shape[1 + inputs :]
        table = w.reshape(len(w), -1, math.prod(out))
        if not eight_bit:
            return cls(table.astype(dtype), None, out)
        table = table.astype(jnp.float32)
        steps = jnp.max(jnp.abs(table), axis=1) / 127
        codes = table / jnp.where(steps == 0, 1, steps)[:, None]
        return cls(jnp.round(codes).astype(jnp.int8), steps, out)

    def __getitem__(self, layer: Any) -> Flat:
        return jax.tree.map(lambda array: array[layer], self)

    def bank(self, number: int, banks: int) -> Flat:
        """One of so many equal parts of the first axis of its outputs."""
        part = lambda array: jnp.split(array, banks, axis=-1)[number]  # noqa: E731
        table, steps = jax.tree.map(part, (self.table, self.steps))
        return Flat(table, steps, (self.out[0] // banks, *self.out[1:]))

    def times(self, x: jax.Array) -> jax.Array:
        """x [M, in] times the array: [M, *out]."""
        if self.steps is None:
            product = x @ self.table.astype(x.dtype)
        else:
            codes = self.table.astype(x.dtype)  # exact in 16 bits, too
            product = (jnp.matmul(x, codes, preferred_element_type=jnp.float32) * self.steps).astype(x.dtype)
        return product.reshape(-1, *self.out)


def dense(x: jax.Array, w: Any, inputs: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out], where `in` is the first `inputs` axes of w: [B, T, *out].

    One plain matrix product over all tokens: with B and T as two axes, XLA's CPU compiler takes a path for the weights'
    gradient that made a feed-forward's backward pass twice as long (76 against 38 ms at 2,560 tokens).
    """
    if isinstance(w, Adapted):
        return dense(x, w.base, inputs) + dense(w.scale * dense(x, w.a, inputs), w.b)
    if isinstance(w, Quantised):
        return _dense_quantised(x, w, inputs)
    if isinstance(w, ByOutput):
        return w.times(x.reshape(*x.shape[:2], -1))
    if isinstance(w, Flat):
        return w.times(x.reshape(-1, w.table.shape[0])).reshape(*x.shape[:2], *w.out)
    size = math.prod(w.shape[:inputs])
    return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*x.shape[:2], *w.shape[inputs:])


def gated(x: jax.Array, gate: Any, up: Any, down: Any, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The gated feed-forward, [B, T, D]: activation(x gate) · (x up), times down (arXiv 2002.05202, equation 6).

    The products of weights that lie by output stay columns between them: turned round on the way, the activation of 64
    times 2,048 numbers took 170 to 290 µs on a CPU for 50 to 110, as XLA's loops then go across memory.
    """
    if isinstance(gate, ByOutput) and isinstance(up, ByOutput) and isinstance(down, ByOutput):
        hidden = activation(gate.columns(x)) * up.columns(x)
        return down.turned(down.rows.astype(x.dtype) @ hidden, x.shape[:-1])
    return dense(activation(dense(x, gate)) * dense(x, up), down)


@partial(jax.checkpoint, static_argnums=2)
def _dense_quantised(x: jax.Array, w: Quantised, inputs: int) -> jax.Array:
    """The backward pass decodes the weight again: kept from the forward pass, all layers' would be the whole model."""
    return dense(x, w.astype(x.dtype), inputs)


def cast(weights: Any, dtype: Any) -> Any:
    """A tree of weights in the dtype of compute; quantised and flat ones stay as they are until `dense` takes them."""

    def one(weight: Any) -> Any:
        return weight if _is_laid(weight) else weight.astype(dtype)

    return jax.tree.map(one, weights, is_leaf=_is_laid)


def quantise(weight: jax.Array, axis: int, kind: Literal["int8", "nf4"]) -> Quantised:
    """A weight in 8 or 4 bits, in blocks along `axis`, counted from the end. See `Quantised` for the error."""
    at = weight.ndim + axis
    size = weight.shape[at]
    block = math.gcd(size, BLOCK)
    shape = (*weight.shape[:at], size // block, block, *weight.shape[at + 1 :])
    blocks = weight.astype(jnp.float32).reshape(shape)
    scales = jnp.max(jnp.abs(blocks), axis=axis)
    shares = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales), at + 1)
    if kind == "int8":
        return Quantised(jnp.round(shares * 127).astype(jnp.int8), scales, axis)
    low, high = jnp.split(_nf4_codes(shares), 2, axis=axis)
    return Quantised(low | high << 4, scales, axis)


def _nf4_codes(shares: jax.Array) -> jax.Array:
    """The nearest of the 16 values, uint8, for numbers from -1 to 1."""
    codes = jnp.zeros(shares.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += (shares > (low + high) / 2).astype(jnp.uint8)
    return codes


def _nf4_values(codes: jax.Array) -> jax.Array:
    """The 16 values' table looked up by one choice for each bit: a gather of single numbers is slow on a TPU."""
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit & 1) == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _is_laid(node: Any) -> bool:
    return isinstance(node, Quantised | Flat)
