"""What one device of this machine reaches on bare work: the rates that others are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TRIES, QUEUED = 5, 4


def matrix_tflops(dtype: str) -> float:
    """A matrix product, 10^12 operations a second, the best of five."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: product(x, x)) / 1e12


def read_gbs() -> float:
    """Memory that is read, 10^9 bytes a second, the best of five; an array too large for any cache."""
    x = jax.random.normal(jax.random.key(0), (2**26 if jax.default_backend() == "cpu" else 2**30,), jnp.bfloat16)
    greatest = jax.jit(jnp.max)
    return x.nbytes / _best(lambda: greatest(x)) / 1e9


def _best(work: Callable[[], Any]) -> float:
    """Seconds of one of several calls that wait for each other, so that asking for them takes no time."""
    jax.block_until_ready(work())
    best = math.inf
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready([work() for _ in range(QUEUED)])
        best = min(best, (time.perf_counter() - start) / QUEUED)
    return best
