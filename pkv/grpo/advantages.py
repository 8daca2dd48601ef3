"""From reward values to advantages: pure functions on arrays.

Letters: K rewards, P prompts, G samples a prompt, T tokens of one response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Scale = Literal["std", "floored_std", "none"]
Baseline = Literal["mean", "leave_one_out"]


def advantages_by_reward(
    values_KPG: np.ndarray,
    scale: Scale,
    std_floor: float = 0.25,
    baseline: Baseline = "mean",
    alike_KPG: np.ndarray | None = None,
) -> np.ndarray:
    """Each reward centred within its group and scaled: float32 [K, P, G]; 0 where there is no value.

    values_KPG: NaN where a reward does not apply or is unscored; such rollouts stay out of their group's mean and std.
    scale: "std" is GRPO (arXiv 2402.03300, section 4.1.2), "none" Dr.GRPO (2503.20783). "floored_std" divides by
    max(std, std_floor): a reward that hardly varies within a group then makes a small advantage instead of a full-size
    one out of noise. Every reward is scaled by itself, as in GDPO (2601.05242), so that none drowns in the sum.
    baseline: "leave_one_out" compares a rollout with the mean of the others (RLOO, 2402.14740, equation 8).
    alike_KPG: whole numbers; a rollout is compared with those of its group that have its own number only, as in
    Blockwise Advantage Estimation (2602.10231): a later block is not paid for what an earlier one did. One that is
    alone has nothing to be compared with, and no advantage.
    """
    alike_KPG = np.zeros(values_KPG.shape, int) if alike_KPG is None else alike_KPG
    # [K, P, G, G]: who is compared with whom; a missing value with nobody.
    there = np.isfinite(values_KPG)
    peers = (alike_KPG[..., :, None] == alike_KPG[..., None, :]) & there[..., :, None] & there[..., None, :]
    values = np.where(there, values_KPG, 0.0).astype(np.float64)
    count = np.maximum(peers.sum(axis=-1), 1)
    mean = (peers * values[..., None, :]).sum(axis=-1) / count
    centred = np.where(there, values - mean, 0.0)
    std = np.sqrt((peers * (values[..., None, :] - mean[..., :, None]) ** 2).sum(axis=-1) / count)
    return _scaled(centred, std, count, scale, std_floor, baseline)


def choice_advantages(
    values_NJ: np.ndarray,
    chosen_N: np.ndarray,
    rates_J: np.ndarray,
    scale: Scale,
    std_floor: float = 0.25,
    baseline: Baseline = "mean",
) -> np.ndarray:
    """Of N choices among J whose values are all known, each compared with the J that could have been made: float32 [N].

    values_NJ: what every choice would have been worth there. chosen_N: which was made; -1: none, as bad as the worst.
    A mean over all J doesn't depend on what was chosen, so it is a baseline (REINFORCE, Williams 1992, section 4) that
    needs no other rollout that fared alike.
    rates_J: taken off the values. With their means over N, always choosing the same gains nothing in sum: what is paid
    is to see what is different here.
    """
    offered_NJ = values_NJ - rates_J
    made_N = np.take_along_axis(offered_NJ, np.maximum(chosen_N, 0)[:, None], axis=1)[:, 0]
    made_N = np.where(chosen_N < 0, offered_NJ.min(axis=1), made_N)
    return _scaled(
        made_N - offered_NJ.mean(axis=1), values_NJ.std(axis=1), values_NJ.shape[1], scale, std_floor, baseline
    )


def _scaled(
    centred: np.ndarray, std: np.ndarray, count: np.ndarray | int, scale: Scale, std_floor: float, baseline: Baseline
) -> np.ndarray:
    if baseline == "leave_one_out":
        centred = centred * count / np.maximum(count - 1, 1)
    if scale == "std":
        centred = centred / (std + 1e-4)
    elif scale == "floored_std":
        centred = centred / np.maximum(std, std_floor)
    return centred.astype(np.float32)


def total_advantages(
    values_KPG: np.ndarray, weights_K: np.ndarray, scale: Scale, std_floor: float, baseline: Baseline
) -> np.ndarray:
    """The advantage of the weighted sum of all rewards, centred and scaled as one: float32 [P, G].

    GRPO with several rewards as the field began it: what varies most drowns the rest. A rollout that lacks a value is
    summed over those it has.
    """
    totals_PG = np.nansum(weights_K[:, None, None] * values_KPG, axis=0)
    totals_PG[np.isnan(values_KPG).all(axis=0)] = np.nan
    return advantages_by_reward(totals_PG[None], scale, std_floor, baseline)[0]


def token_advantages(
    advantages_K: np.ndarray, weights_K: np.ndarray, owners_KT: np.ndarray, whole_K: np.ndarray
) -> np.ndarray:
    """The advantage of each token of one response: A[t] = sum over k of w[k]·max(m[k,t], whole[k])·A[k], float32 [T].

    owners_KT: 1 where token t belongs to the block that owns reward k. whole_K: the share of reward k that every token
    of the response gets; 1 for all k is the classic scalar, 0 is pure block credit (arXiv 2602.10231).
    """
    shares_KT = np.maximum(owners_KT.astype(np.float32), whole_K[:, None])
    return ((weights_K * advantages_K) @ shares_KT).astype(np.float32)


def whiten(
    advantages: Sequence[np.ndarray],
    chosen: Sequence[np.ndarray],
    centre: bool,
    by_response: bool = False,
    gather: Callable[[Any], list[Any]] = lambda said: [said],
) -> list[np.ndarray]:
    """The token advantages [T] of a batch's responses at unit standard deviation over its trained tokens, float32.

    chosen: 1 for the tokens that are trained on, [T] each; the deviation is theirs. by_response: every response counts
    the same, as in GDPO's last step (arXiv 2601.05242), not every token, as in REINFORCE++ (2501.03262, equation 5).
    centre: their mean becomes 0 as well. With block credit it must not: tokens that own nothing would be paid. The
    deviation is then taken from 0. gather: what every host says of its own part of the batch.
    """
    shares = [one / max(one.sum(), 1.0) if by_response else one for one in chosen]
    weights, tokens = (np.concatenate([np.zeros(0), *arrays]) for arrays in (shares, advantages))
    count, total = np.sum(gather([weights.sum(), weights @ tokens]), axis=0)
    mean = total / max(count, 1e-9) if centre else 0.0
    size = np.sqrt(sum(gather((weights @ (tokens - mean) ** 2).item())) / max(count, 1e-9)) + 1e-8
    return [((one - mean) / size).astype(np.float32) for one in advantages]


def soft_overlong(lengths: np.ndarray, budget: int, cache: int) -> np.ndarray:
    """DAPO's penalty for length in tokens: 0 up to budget - cache, then down to -1 (2503.14476, equation 13)."""
    return -np.clip((lengths - (budget - cache)) / cache, 0.0, 1.0)


def groups_with_signal(
    values_KPG: np.ndarray, alike_KPG: np.ndarray | None = None, tolerance: float = 1e-6
) -> np.ndarray:
    """bool [P]: the groups in which some of the K rewards differs between samples that are compared; NaN is no value.

    alike_KPG: as in `advantages_by_reward`.
    """
    apart = np.abs(values_KPG[..., :, None] - values_KPG[..., None, :]) > tolerance  # never with a NaN
    if alike_KPG is not None:
        apart &= alike_KPG[..., :, None] == alike_KPG[..., None, :]
    return np.asarray(apart.any(axis=(0, 2, 3)))
