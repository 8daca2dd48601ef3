"""From scored groups to what the trainer takes: every response with an advantage for each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkv.config import GrpoConfig
from pkv.grpo import Sequence as TrainingSequence
from pkv.grpo import advantages_by_reward, token_advantages
from pkv.grpo.advantages import groups_with_signal
from pkv.records import OWNERS, Group


@dataclass(frozen=True)
class Credit:
    """sequences: what is trained on. by_owner: [prompt][sample] -> mean advantage of each owner's tokens.

    silent: the share of groups that were left out because no weighted reward differs in them.
    """

    sequences: list[TrainingSequence]
    by_owner: list[list[dict[str, float]]]
    silent: float


def assign_credit(
    groups: Sequence[Group], weights: Mapping[str, float], whole_trace: Mapping[str, float], config: GrpoConfig
) -> Credit:
    """Advantages by reward, spread over the tokens of the blocks that own them.

    whole_trace: reward -> the share of its advantage that all other tokens get too.
    """
    names = [name for name, weight in weights.items() if weight]
    owners = [groups[0].cards[0].rewards[name].owner for name in names]
    values_KPG = np.array([[[_value(card.rewards[n].value) for card in g.cards] for g in groups] for n in names])
    advantages_KPG = advantages_by_reward(values_KPG, config.scale, config.std_floor)
    weights_K = np.array([weights[name] for name in names], np.float32)
    whole_K = np.array([whole_trace[name] for name in names], np.float32)
    signal_P = groups_with_signal(advantages_KPG, weights_K)
    sequences: list[TrainingSequence] = []
    by_owner: list[list[dict[str, float]]] = []
    for p, group in enumerate(groups):
        by_owner.append([])
        for g, (rollout, trace) in enumerate(zip(group.rollouts, group.traces, strict=True)):
            owners_KT = np.array([trace.owner_mask(owner) for owner in owners])
            advantages_T = token_advantages(advantages_KPG[:, p, g], weights_K, owners_KT, whole_K)
            by_owner[-1].append(_mean_by_owner(advantages_T, trace.token_owners))
            if signal_P[p] and not (config.mask_truncated and rollout.finish == "length"):
                said = rollout.tokens, advantages_T, rollout.logprobs, rollout.forced
                sequences.append(TrainingSequence(group.prompt.tokens, *said))
    return Credit(sequences, by_owner, 1.0 - float(signal_P.mean()))


def _value(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean_by_owner(advantages_T: np.ndarray, token_owners: np.ndarray) -> dict[str, float]:
    present = [owner for owner in range(len(OWNERS)) if (token_owners == owner).any()]
    return {OWNERS[owner]: float(advantages_T[token_owners == owner].mean()) for owner in present}
