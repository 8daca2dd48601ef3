"""Responses of unequal length into rows of equal length: first-fit-decreasing, told apart by segment numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pkv.config import UserError
from pkv.records import Batch


@dataclass(frozen=True)
class Sequence:
    """A prompt and its response. advantages, logprobs: float32, one for each response token.

    forced: bool, the response tokens that the policy did not choose, which are not trained on; None: none.
    """

    prompt: np.ndarray
    response: np.ndarray
    advantages: np.ndarray
    logprobs: np.ndarray
    forced: np.ndarray | None = None

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response) - 1  # the last token is only ever a target


def pack(sequences: Iterable[Sequence], row_tokens: int, rows_multiple: int = 1) -> Batch:
    """Rows of `row_tokens`, as few as first-fit-decreasing finds, padded to a multiple of `rows_multiple` rows.

    The order of the sequences does not change what is computed from the batch, only where it stands. Raises UserError
    for a sequence longer than a row.
    """
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -s.size):
        if sequence.size > row_tokens:
            raise UserError(
                f"grpo.row_tokens: {row_tokens} is too short for a prompt and response of {sequence.size} tokens; "
                "raise it, or lower max_new_tokens"
            )
        at = next((i for i, left in enumerate(room) if left >= sequence.size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[at].append(sequence)
        room[at] -= sequence.size
    count = max(1, -(-len(rows) // rows_multiple)) * rows_multiple
    batch = _empty(count, row_tokens)
    for row, members in enumerate(rows):
        start = 0
        for number, sequence in enumerate(members, 1):
            _place(batch, row, start, number, sequence)
            start += sequence.size
    return batch


def _empty(rows: int, length: int) -> Batch:
    whole = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "positions", "segments", "targets")}
    real = {name: np.zeros((rows, length), np.float32) for name in ("mask", "advantages", "sampler_logprobs")}
    return Batch(**whole, **real)


def _place(batch: Batch, row: int, start: int, number: int, sequence: Sequence) -> None:
    tokens = np.concatenate((sequence.prompt, sequence.response))
    here = np.s_[row, start : start + sequence.size]
    generated = np.s_[row, start + len(sequence.prompt) - 1 : start + sequence.size]
    batch.tokens[here] = tokens[:-1]
    batch.targets[here] = tokens[1:]
    batch.positions[here] = np.arange(sequence.size)
    batch.segments[here] = number
    chosen = np.float32(1.0) if sequence.forced is None else ~sequence.forced
    batch.mask[generated] = chosen
    batch.advantages[generated] = sequence.advantages * chosen
    batch.sampler_logprobs[generated] = sequence.logprobs * chosen
