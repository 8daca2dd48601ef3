"""AdamW's moments in 16 or 8 bits, rounded at random so that small changes are not lost."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Kind = Literal["float32", "bfloat16", "float8"]
MANTISSA = {jnp.dtype(jnp.bfloat16): 7, jnp.dtype(jnp.float8_e4m3fn): 3}  # bits after the leading one
LARGEST = 224.0  # of e4m3's 448: what is rounded up stays finite
SMALLEST = 2.0**-6  # e4m3's smallest number with its whole mantissa,
LEAST = 2.0**-9  # and its smallest


class Scaled(NamedTuple):
    """An array in 8 bits: values [..., n] times a float32 scale [..., 1]."""

    values: jax.Array
    scale: jax.Array


class Moments(NamedTuple):
    """Adam's state: steps taken, first moments, and second moments (in 8 bits their square roots)."""

    steps: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(b1: float, b2: float, kind: Kind, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's step (arXiv 1412.6980) with moments kept in `kind`: 8, 4 or 2 bytes a weight for both.

    Rounded to the nearest, a second moment that changes by 1 - b2 = 0.01 of itself would stay for ever where a number's
    neighbours are at least 0.06 of it apart. Rounded up or down at random, the likelier the nearer (2010.06192), it
    moves as far on average. In 8 bits the root of a second moment is at least 9e-6 of its row's largest: a weight whose
    gradient is smaller than that moves less.
    The draws depend on the step and the weight's place only, so that a run can be made again on any mesh.
    """
    if kind == "float32":
        return optax.scale_by_adam(b1, b2, eps)
    dtype = jnp.dtype(jnp.bfloat16 if kind == "bfloat16" else jnp.float8_e4m3fn)

    def init(params: Any) -> Moments:
        def zeros(weight: jax.Array) -> Any:
            if kind == "bfloat16":
                return jnp.zeros(weight.shape, dtype)
            return Scaled(jnp.zeros(weight.shape, dtype), jnp.zeros((*weight.shape[:-1], 1), jnp.float32))

        return Moments(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        del params
        count = state.steps + 1
        leaves, structure = jax.tree.flatten(updates)
        mus, nus = structure.flatten_up_to(state.mu), structure.flatten_up_to(state.nu)
        steps, new_mus, new_nus = [], [], []
        for number, (gradient, mu, nu) in enumerate(zip(leaves, mus, nus, strict=True)):
            gradient = gradient.astype(jnp.float32)
            mu = b1 * _read(mu) + (1 - b1) * gradient
            nu = b2 * (_read(nu) if kind == "bfloat16" else _read(nu) ** 2) + (1 - b2) * gradient**2
            corrected = jnp.sqrt(nu / (1 - b2**count))
            steps.append(mu / (1 - b1**count) / (corrected + eps))
            seed = count.astype(jnp.uint32) * 2 * len(leaves) + 2 * number
            new_mus.append(_keep(mu, dtype, seed))
            new_nus.append(_keep(nu if kind == "bfloat16" else jnp.sqrt(nu), dtype, seed + 1, least=LEAST))
        whole = structure.unflatten
        return whole(steps), Moments(count, whole(new_mus), whole(new_nus))

    return optax.GradientTransformation(init, update)


def _read(kept: jax.Array | Scaled) -> jax.Array:
    return kept.values.astype(jnp.float32) * kept.scale if isinstance(kept, Scaled) else kept.astype(jnp.float32)


def _keep(x: jax.Array, dtype: Any, seed: jax.Array, least: float = 0.0) -> jax.Array | Scaled:
    """least: in 8 bits, what a value is at least; a root that became 0 would divide a step."""
    mantissa = MANTISSA[dtype]
    if dtype == jnp.bfloat16:
        return round_at_random(x, mantissa, seed).astype(dtype)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST
    scaled = x / jnp.where(scale > 0, scale, 1.0)
    if least:
        scaled = jnp.maximum(scaled, least)
    return Scaled(round_at_random(scaled, mantissa, seed, SMALLEST).astype(dtype), scale)


def round_at_random(x: jax.Array, mantissa: int, seed: jax.Array, smallest: float = 0.0) -> jax.Array:
    """float32 with the last bits of its mantissa 0: up or down, with chances that make the mean right.

    smallest: the target's smallest number with its whole mantissa; below it numbers are evenly spaced.
    """
    noise, dropped = _noise(x.shape, seed), jnp.uint32((1 << (23 - mantissa)) - 1)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + (noise & dropped)) & ~dropped, jnp.float32)
    if not smallest:
        return rounded
    chance = (noise >> 8).astype(jnp.float32) * 2.0**-24
    space = smallest / 2**mantissa
    near_0 = jnp.sign(x) * jnp.floor(jnp.abs(x) / space + chance) * space
    return jnp.where(jnp.abs(x) < smallest, near_0, rounded)


def _noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """32 bits for every place, a hash of its number (MurmurHash3's end): the same however the array is spread."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    bits = (places * jnp.uint32(0x9E3779B1)) ^ (seed.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
