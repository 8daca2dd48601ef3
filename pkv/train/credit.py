"""From scored groups to what the trainer takes: every response with an advantage for each of its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pkv.config import GrpoConfig
from pkv.grpo import Sequence as TrainingSequence
from pkv.grpo import advantages_by_reward, token_advantages
from pkv.grpo.advantages import choice_advantages, groups_with_signal, soft_overlong, total_advantages, whiten
from pkv.hosts import gather
from pkv.records import FIGHTERS, OWNERS, Group, Scorecard

JUDGED = "judge_accuracy"
OVERLONG = "overlong"  # the punishment for coming near the budget, beside the rewards; all tokens own it


@dataclass(frozen=True)
class Credit:
    """sequences: what is trained on. by_owner: [prompt][sample] -> mean advantage of each owner's tokens;
    empty for what isn't trained on.

    silent: the share of groups that were left out because nothing that gives them a signal differs in them, or because
    none of their responses may be trained on.
    """

    sequences: list[TrainingSequence]
    by_owner: list[list[dict[str, float]]]
    silent: float


def assign_credit(
    groups: Sequence[Group],
    weights: Mapping[str, float],
    whole_trace: Mapping[str, float],
    config: GrpoConfig,
    budget: int,
) -> Credit:
    """Advantages by reward, spread over the tokens of the blocks that own them.

    whole_trace: reward -> the share of its advantage that all other tokens get too. budget: max_new_tokens.
    """
    names = [name for name, weight in weights.items() if weight]
    values_KPG = _values(groups, names)
    weights_K = np.array([weights[name] for name in names], np.float32)
    whole_K = np.array([whole_trace[name] for name in names], np.float32)
    owners = [groups[0].cards[0].rewards[name].owner for name in names]
    if config.overlong_tokens:
        lengths_PG = np.array([[len(rollout.tokens) for rollout in group.rollouts] for group in groups])
        punishment_PG = soft_overlong(lengths_PG, budget, config.overlong_tokens)
        values_KPG = np.concatenate((values_KPG, punishment_PG[None]))
        weights_K, whole_K = np.append(weights_K, config.overlong_weight), np.append(whole_K, 1.0)
        names, owners = [*names, OVERLONG], [*owners, "trace"]
    trained_PG = trained_on(groups, weights, config)
    if config.combine == "total":
        values_KPG[:, _failed(groups, names)] = np.nan  # a sum without it would make it a silent 0
        scaled = config.scale, config.std_floor, config.baseline
        advantages_KPG = total_advantages(values_KPG, weights_K, *scaled)[None]
        owners, weights_K, whole_K = ["trace"], np.ones(1, np.float32), np.ones(1, np.float32)
    else:
        alike_KPG = np.array([_alike(name, groups, config) for name in names])
        advantages_KPG = advantages_by_reward(values_KPG, config.scale, config.std_floor, config.baseline, alike_KPG)
        if config.judge_baseline == "rates" and JUDGED in names:
            at = names.index(JUDGED)
            advantages_KPG[at] = _judged(groups, trained_PG & np.isfinite(values_KPG[at]), config)
    trained = [(int(p), int(g)) for p, g in np.argwhere(trained_PG)]
    found: dict[tuple[int, int], np.ndarray] = {}
    for p, g in trained:
        owners_KT = np.array([groups[p].traces[g].owner_mask(owner) for owner in owners])
        found[p, g] = token_advantages(advantages_KPG[:, p, g], weights_K, owners_KT, whole_K)
    sequences = [_sequence(groups[p], g, found[p, g]) for p, g in trained]
    if config.whiten != "none":
        centre = config.credit == "sequence"
        chosen, by_response = [sequence.chosen for sequence in sequences], config.whiten == "responses"
        whitened = whiten([sequence.advantages for sequence in sequences], chosen, centre, by_response, gather)
        sequences = [
            dataclasses.replace(sequence, advantages=advantages)
            for sequence, advantages in zip(sequences, whitened, strict=True)
        ]
    by_owner: list[list[dict[str, float]]] = [[{} for _ in group.traces] for group in groups]
    for (p, g), sequence in zip(trained, sequences, strict=True):
        by_owner[p][g] = _mean_by_owner(sequence.advantages, groups[p].traces[g].token_owners)
    return Credit(sequences, by_owner, 1.0 - float(trained_PG.any(axis=1).mean()))


def _sequence(group: Group, sample: int, advantages_T: np.ndarray) -> TrainingSequence:
    rollout = group.rollouts[sample]
    return TrainingSequence(group.prompt.tokens, rollout.tokens, advantages_T, rollout.logprobs, rollout.forced)


def with_signal(groups: Sequence[Group], weights: Mapping[str, float], config: GrpoConfig) -> np.ndarray:
    """bool [P]: the groups of which anything is trained on."""
    return np.asarray(trained_on(groups, weights, config).any(axis=1))


def trained_on(groups: Sequence[Group], weights: Mapping[str, float], config: GrpoConfig) -> np.ndarray:
    """bool [P, G]: of the groups in which one of the rewards of `config.signal`, or of all with a weight, differs, the
    rollouts that aren't masked.

    Nearly every group differs in some reward that is a matter of degree, such as length: whoever wants groups without
    anything to learn left out names what is to be learnt.
    """
    paid = [name for name, weight in weights.items() if weight]
    names = config.signal or paid
    values_KPG = _values(groups, names)
    if config.combine == "total":  # nobody is compared with a rollout that has no total
        values_KPG[:, _failed(groups, paid)] = np.nan
    alike_KPG = np.array([_alike(name, groups, config) for name in names])
    signal_P = groups_with_signal(values_KPG, alike_KPG if config.combine == "rewards" else None)
    if config.judge_baseline == "rates" and JUDGED in names:  # wherever fighters disagree, for names are compared there
        signal_P |= np.isfinite(values_KPG[names.index(JUDGED)]).any(axis=1)
    truncated_PG = np.array([[rollout.finish == "length" for rollout in group.rollouts] for group in groups])
    return signal_P[:, None] & ~(config.mask_truncated & truncated_PG)


def _values(groups: Sequence[Group], names: Sequence[str]) -> np.ndarray:
    """float64 [K, P, G], NaN where there is no value."""
    return np.array([[[_value(card, name) for card in group.cards] for group in groups] for name in names])


def _value(card: Scorecard, name: str) -> float:
    value = card.rewards[name].value
    return float("nan") if value is None else value


def _failed(groups: Sequence[Group], names: Sequence[str]) -> np.ndarray:
    """bool [P, G]: rollouts of which one of the rewards couldn't be scored."""
    return np.array([[bool(set(card.unscored) & set(names)) for card in group.cards] for group in groups])


def _alike(name: str, groups: Sequence[Group], config: GrpoConfig) -> list[list[int]]:
    """With whom a rollout is compared: for the judge's accuracy, with those of whose fighters as many were right."""
    by_fighters = name == JUDGED and config.judge_baseline == "alike"
    return [[_right_fighters(card) if by_fighters else 0 for card in group.cards] for group in groups]


def _right_fighters(card: Scorecard) -> int:
    return sum(bool(card.facts.get(f"right/{name}")) for name in FIGHTERS)


def _judged(groups: Sequence[Group], there_PG: np.ndarray, config: GrpoConfig) -> np.ndarray:
    """The advantages of the judge's accuracy against the other names that it could have given: float32 [P, G].

    there_PG: what has a value and is trained on; rates are of no others, or a favourite would gain by those left out.
    """
    cards = [groups[p].cards[g] for p, g in np.argwhere(there_PG)]
    right_NJ = np.array([[bool(card.facts[f"right/{name}"]) for name in FIGHTERS] for card in cards], float)
    right_NJ = right_NJ.reshape(-1, len(FIGHTERS))
    winners = [card.facts["winner"] for card in cards]
    chosen_N = np.array([FIGHTERS.index(name) if name in FIGHTERS else -1 for name in winners], int)
    *right_J, count = np.sum(gather([*right_NJ.sum(axis=0).tolist(), len(cards)]), axis=0)
    rates_J = np.array(right_J) / max(count, 1)
    found_PG = np.zeros(there_PG.shape, np.float32)
    found_PG[there_PG] = choice_advantages(right_NJ, chosen_N, rates_J, config.scale, config.std_floor, config.baseline)
    return found_PG


def _mean_by_owner(advantages_T: np.ndarray, token_owners: np.ndarray) -> dict[str, float]:
    present = [owner for owner in range(len(OWNERS)) if (token_owners == owner).any()]
    return {OWNERS[owner]: float(advantages_T[token_owners == owner].mean()) for owner in present}
