"""Randomness of rollouts, keyed by what it is for: never by slot, batch place or host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pkv.mesh import fold


def row_keys(seed: int, purpose: str, step: int, problem_ids: list[str], samples: int) -> np.ndarray:
    """The key of every rollout, uint32 [P, G, 2]: fold_in(root, purpose, step, problem, sample).

    The engine folds in each token's position; so a rollout's draws are the same wherever and whenever it is made.
    """
    if not problem_ids or not samples:
        return np.zeros((len(problem_ids), samples, 2), np.uint32)
    root = fold(jax.random.key(seed), purpose, step)
    keys = [[fold(root, problem, sample) for sample in range(samples)] for problem in problem_ids]
    return np.asarray(jax.random.key_data(jnp.stack([jnp.stack(row) for row in keys])))
