"""From reward values to advantages: pure functions on arrays.

Letters: K rewards, P prompts, G samples a prompt, T tokens of one response.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

Scale = Literal["std", "floored_std", "none"]


def advantages_by_reward(values_KPG: np.ndarray, scale: Scale, std_floor: float = 0.25) -> np.ndarray:
    """Each reward centred within its group and scaled: float32 [K, P, G]; 0 where there is no value.

    values_KPG: NaN where a reward does not apply or is unscored; such rollouts stay out of their group's mean and std.
    "std" is GRPO (arXiv 2402.03300), "none" Dr.GRPO (2503.20783). "floored_std" divides by max(std, std_floor): a
    reward that hardly varies within a group then makes a small advantage instead of a full-size one out of noise.
    Every reward is scaled by itself, as in GDPO (2601.05242), so that none drowns in the sum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any value has no mean: its advantages are 0
        mean = np.nanmean(values_KPG, axis=-1, keepdims=True)
        std = np.nanstd(values_KPG, axis=-1, keepdims=True)
    centred = values_KPG - mean
    if scale == "std":
        centred = centred / (std + 1e-4)
    elif scale == "floored_std":
        centred = centred / np.maximum(std, std_floor)
    return np.nan_to_num(centred, nan=0.0).astype(np.float32)


def token_advantages(
    advantages_K: np.ndarray, weights_K: np.ndarray, owners_KT: np.ndarray, whole_K: np.ndarray
) -> np.ndarray:
    """The advantage of each token of one response: A[t] = sum over k of w[k]·max(m[k,t], whole[k])·A[k], float32 [T].

    owners_KT: 1 where token t belongs to the block that owns reward k. whole_K: the share of reward k that every token
    of the response gets; 1 for all k is the classic scalar, 0 is pure block credit (arXiv 2602.10231).
    """
    shares_KT = np.maximum(owners_KT.astype(np.float32), whole_K[:, None])
    return ((weights_K * advantages_K) @ shares_KT).astype(np.float32)


def groups_with_signal(advantages_KPG: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """bool [P]: the groups in which some weighted reward differs between samples."""
    return (np.abs(advantages_KPG) * (weights_K != 0)[:, None, None] > 1e-6).any(axis=(0, 2))
