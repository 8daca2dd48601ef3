"""The nouns of pkv, in the order in which the data flows: problem, prompt, rollout, trace, scorecard, group, batch.

Each word means one thing everywhere: in code, config, logs and files. numpy only; no jax, no text processing here.
Masks and lengths travel with the data from where they are known; nothing works them out again from token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FIGHTERS = ("pirate", "knight", "viking")
BLOCKS = (*FIGHTERS, "result", "winner", "answer")
# Who a generated token belongs to. "tags": the construct's twelve tags. "outside": text where no text should stand.
OWNERS = ("outside", "tags", *BLOCKS)
# A reward is owned by one of these; "trace" means every token of the response, "judge" the ruling and the name in it.
REWARD_OWNERS = ("trace", "judge", *OWNERS)

Finish = Literal["stop", "length"]


class Span(NamedTuple):
    """A half-open range [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer, both as text."""

    id: str
    question: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A problem rendered for the model: token ids, int32, shape [T]."""

    problem: Problem
    tokens: np.ndarray


@dataclass(frozen=True)
class Rollout:
    """One generated response, tokens only.

    tokens: int32 [T], the stop token included when `finish` is "stop".
    logprobs: float32 [T], natural log, under the distribution that the sampler drew from (temperature, top-k, top-p).
    policy_logprobs: float32 [T], under the untempered policy.
    policy_step: the training step whose weights made it.
    forced: bool [T], the tokens that were put there whatever the policy would have said; None: none were.
    """

    problem_id: str
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish: Finish
    policy_step: int = 0
    forced: np.ndarray | None = None


class Verdict(NamedTuple):
    """What a watch says of a row's new tokens.

    keep: so many of them stand, at least the first, so that a row always goes on; the others are as if never said.
    forced: int32 ids that follow those that stand, whatever the policy would have said; usually none.
    done: the row ends there.
    """

    keep: int
    forced: np.ndarray
    done: bool


# One for each row, because it remembers: told the row's new tokens, int32 [t], in order and in pieces of any size.
# Forced tokens come back to it first among the next new ones.
Watch = Callable[[np.ndarray], Verdict]


@dataclass(frozen=True)
class Block:
    """One part of the construct: the characters and the tokens between its tags (tags excluded)."""

    name: str
    chars: Span
    tokens: Span


@dataclass(frozen=True)
class TraceError:
    """What is wrong with a trace, by code (see competition.parser), at a character."""

    code: str
    message: str
    at: int


@dataclass(frozen=True)
class Segment:
    """A stretch of text with one owner out of OWNERS; a trace's segments tile its text."""

    owner: str
    chars: Span
    tokens: Span


@dataclass(frozen=True)
class Trace:
    """A rollout's text taken apart.

    blocks: the blocks that were found, by name; a missing one is absent. `answer` is the text after </competition>.
    segments: tile the text from 0 to len(text).
    token_owners: int8 [T], index into OWNERS for each generated token; one that straddles a border belongs to the tag.
    truncated: the rollout ended at its token limit.
    """

    text: str
    blocks: Mapping[str, Block]
    segments: tuple[Segment, ...]
    token_owners: np.ndarray
    errors: tuple[TraceError, ...] = ()
    truncated: bool = False

    def block_text(self, name: str) -> str | None:
        """The text of a block, or None when the trace has no such block."""
        block = self.blocks.get(name)
        return None if block is None else self.text[block.chars.start : block.chars.stop]

    def owner_mask(self, owner: str) -> np.ndarray:
        """bool [T]: the generated tokens that belong to `owner` (one of REWARD_OWNERS)."""
        if owner == "trace":
            return np.ones(len(self.token_owners), bool)
        if owner == "judge":
            return self.owner_mask("result") | self.owner_mask("winner")
        return self.token_owners == OWNERS.index(owner)


@dataclass(frozen=True)
class Reward:
    """One reward of one trace. value None: it doesn't apply ("absent"), or it failed ("unscored", never a silent 0)."""

    name: str
    value: float | None
    owner: str
    status: Literal["scored", "absent", "unscored"] = "scored"
    detail: str = ""


@dataclass(frozen=True)
class Scorecard:
    """Every reward of a trace by name, the weighted total, and the facts worth reading beside them.

    total: sum of weight * value over scored rewards with a weight.
    facts: what was found on the way: fighters' answers, which fighters are right, overlaps, length/<block> in tokens.
    """

    rewards: Mapping[str, Reward]
    total: float
    final_answer: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unscored(self) -> tuple[str, ...]:
        return tuple(name for name, reward in self.rewards.items() if reward.status == "unscored")


@dataclass(frozen=True)
class Group:
    """The rollouts of one problem, with their traces and scorecards, in sample order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    traces: tuple[Trace, ...]
    cards: tuple[Scorecard, ...]


@dataclass(frozen=True)
class Batch:
    """Packed rows, ready for the device; several sequences share a row and are told apart by `segments`.

    tokens, positions, segments, branches: int32 [B, T]; segment 0 is padding, positions restart at 0 in each segment.
    Branch 0 of a segment is its prompt but for the last token; each other branch, numbered anew in every row, is that
    last token and a response, and goes on at the prompt's last position.
    targets: int32 [B, T], the next token of the same branch. mask: float32 [B, T], 1 where the target was generated.
    weights: float32 [B, T], what the target's loss counts in the sum.
    advantages, sampler_logprobs: float32 [B, T], aligned with `targets`, 0 where mask is 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    sampler_logprobs: np.ndarray
