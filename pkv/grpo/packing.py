"""Responses of unequal length into rows, and rows into micro-batches of as many tokens, told apart by numbers.

Of several hosts each packs its own responses into its own rows of every micro-batch. They tell each other sizes only:
what a token counts, and shapes, so that all take part in as many micro-batches of the same shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pkv.config import UserError
from pkv.records import Batch

Normalise = Literal["tokens", "sequences", "constant"]
# Every shape of a micro-batch is a program to be compiled, so there are few: lengths are eighths of `row_tokens`,
EIGHTHS = 8
QUARTERS = 4  # the longest rows quarters of it; micro-batches have quarters of a whole one's rows;
HALVINGS = 2  # and short responses go into rows of a half or a quarter of the longest.


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

    @property
    def chosen(self) -> np.ndarray:
        """float32 [T]: 1 for the tokens that are trained on."""
        return np.ones(len(self.response), np.float32) if self.forced is None else (~self.forced).astype(np.float32)


@dataclass(frozen=True)
class Tree:
    """Responses behind one copy of their prompt."""

    members: tuple[Sequence, ...]

    @property
    def size(self) -> int:
        return len(self.members[0].prompt) - 1 + sum(len(member.response) for member in self.members)


@dataclass(frozen=True)
class Micro:
    """A micro-batch to be: rows of trees, and the B and T of its arrays."""

    rows: list[list[Tree]]
    count: int
    length: int


@dataclass(frozen=True)
class Layout:
    """How sequences become micro-batches.

    row_tokens: the longest a row may be. micro_rows: such rows in a micro-batch, or as many tokens in shorter rows.
    share_prompts: responses may stand behind one copy of their prompt, where that is less work.
    rows_multiple, time_multiple: what a micro-batch's rows and their length must be multiples of.
    crossover: the row length at which attention is as much work as all matrices (`pkv.model.arithmetic`).
    normalise, budget: see `PolicyLoss.normalise`; the budget is max_new_tokens, read by "constant" only.
    hosts: which share a micro-batch's rows evenly. most_trees: that one row holds; 0: any number.
    """

    row_tokens: int
    micro_rows: int
    share_prompts: bool = False
    rows_multiple: int = 1
    time_multiple: int = 1
    crossover: float = math.inf
    normalise: Normalise = "tokens"
    budget: int = 1
    hosts: int = 1
    most_trees: int = 0

    def rounded(self, tokens: int) -> int:
        """The next eighth of `row_tokens`, in whole multiples."""
        step = -(-self.row_tokens // EIGHTHS)
        step = -(-step // self.time_multiple) * self.time_multiple
        return -(-tokens // step) * step

    def rows(self, length: int) -> int:
        """A host's rows of a whole micro-batch of that length."""
        count = self.micro_rows * self.row_tokens // length
        return max(1, count // self.rows_multiple) * self.least_rows

    @property
    def least_rows(self) -> int:
        """What a host's rows of a micro-batch are a multiple of."""
        return self.rows_multiple // self.hosts


def pack(
    sequences: Iterable[Sequence], layout: Layout, gather: Callable[[Any], list[Any]] = lambda said: [said]
) -> list[Batch]:
    """The micro-batches of one update, of each this host's rows; their weights make its loss one sum over all tokens.

    The order of the sequences does not change what is computed, only where it stands. gather: what every host says, in
    their order. Raises UserError for a sequence longer than a row.
    """
    sequences = list(sequences)
    for sequence in sequences:
        if sequence.size > layout.row_tokens:
            raise UserError(
                f"grpo.row_tokens: {layout.row_tokens} is too short for a prompt and response of {sequence.size} "
                "tokens; raise it, or lower max_new_tokens"
            )
    trained = [float(sequence.chosen.sum()) for sequence in sequences]
    longest = max((sequence.size for sequence in sequences), default=1)
    trained_, count, needed = zip(*gather([sum(trained), len(sequences), longest]), strict=True)
    weigh = _weights(sequences, layout, sum(trained_), max(sum(count), 1))
    plans = [
        sorted(plan, key=lambda micro: (-micro.length, -micro.count)) for plan in _plans(sequences, max(needed), layout)
    ]
    told = gather([[(micro.length, micro.count) for micro in plan] for plan in plans])
    agreed = [_agreed(shapes, layout) for shapes in zip(*told, strict=True)]
    best = min(range(len(plans)), key=lambda at: _work(layout, agreed[at]))
    left, batches = plans[best], []
    for length, count in agreed[best]:
        mine = left and left[0].count <= layout.rows(length)
        batches.append(_fill(Micro(left[0].rows if mine else [], count, length), weigh))
        left = left[1:] if mine else left
    return batches


def _agreed(told: List[List[tuple[int, int]]], layout: Layout) -> list[tuple[int, int]]:
    """Length and rows of every micro-batch that all hosts take part in, each with the next of its own or with nothing.

    told: by host, those of its own, the longest first. Where one host's is longer than another's both go together,
    unless the shorter one has more rows than there may be of that length.
    """
    left, found = [list(shapes) for shapes in told], []
    while any(left):
        length = max(shapes[0][0] for shapes in left if shapes)
        taken = [shapes for shapes in left if shapes and shapes[0][1] <= layout.rows(length)]
        found.append((length, max(shapes.pop(0)[1] for shapes in taken)))
    return found


def _plans(sequences: List[Sequence], needed: int, layout: Layout) -> Iterator[list[Micro]]:
    """Ways to pack: prompts shared or not, and rows from as long as the longest response up to as long as they may be.

    In long rows less room is left over, in short ones attention has less to do. needed: the longest of all hosts.
    """
    quarters = {layout.rounded(-(-layout.row_tokens * part // QUARTERS)) for part in range(1, QUARTERS + 1)}
    for longest in sorted(length for length in quarters if length >= needed):
        yield _micro_batches([Tree((sequence,)) for sequence in sequences], longest, layout)
        if layout.share_prompts:
            yield _micro_batches(_plant(sequences, longest), longest, layout)


def _work(layout: Layout, shapes: List[tuple[int, int]]) -> float:
    """What a plan costs, padding included: a token's matrices are 1."""
    return sum(count * length * (1 + length / layout.crossover) for length, count in shapes)


def _plant(sequences: List[Sequence], most: int) -> list[Tree]:
    """Responses to the same prompt together, as many as `most` tokens hold."""
    by_prompt: dict[bytes, list[list[Sequence]]] = {}
    for sequence in sorted(sequences, key=lambda s: -s.size):
        trees = by_prompt.setdefault(sequence.prompt.tobytes(), [])
        home = next((tree for tree in trees if Tree((*tree, sequence)).size <= most), None)
        if home is None:
            trees.append([sequence])
        else:
            home.append(sequence)
    return [Tree(tuple(tree)) for trees in by_prompt.values() for tree in trees]


def _micro_batches(trees: List[Tree], longest: int, layout: Layout) -> list[Micro]:
    """Rows of trees, by micro-batch.

    Attention's work grows with a row's length, so short trees go into short rows, as long as these fill whole
    micro-batches; what is left over goes with the next longer ones. The last micro-batch has as few rows as it needs.
    """
    lengths = sorted({layout.rounded(-(-longest // 2**halving)) for halving in range(HALVINGS + 1)})
    found: list[Micro] = []
    left: list[Tree] = []
    shorter = 0
    for length in lengths:
        rows = _first_fit(
            [*left, *(tree for tree in trees if shorter < tree.size <= length)], length, layout.most_trees
        )
        shorter, whole = length, layout.rows(length)
        full = len(rows) // whole * whole
        found += [_micro(rows[at : at + whole], length, layout) for at in range(0, full, whole)]
        left = [tree for row in rows[full:] for tree in row]
    if left or not found:
        found.append(_micro(_first_fit(left, longest, layout.most_trees), longest, layout))
    return found


def _micro(rows: list[list[Tree]], length: int, layout: Layout) -> Micro:
    """As short as its rows allow, with as many quarters of a whole micro-batch's rows as they need."""
    used = max((sum(tree.size for tree in row) for row in rows), default=1)
    whole, least = layout.rows(length), layout.least_rows
    step = -(-whole // (QUARTERS * least)) * least
    count = min(max(1, -(-len(rows) // step)) * step, whole)
    return Micro(rows, count, min(length, layout.rounded(used)))


def _first_fit(trees: List[Tree], length: int, most: int = 0) -> list[list[Tree]]:
    """First-fit-decreasing, the fullest rows first; `most` trees in a row, if that isn't 0."""
    rows: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda t: -t.size):
        at = next((i for i, left in enumerate(room) if left >= tree.size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(tree)
        room[at] = 0 if len(rows[at]) == most else room[at] - tree.size
    return [rows[at] for at in sorted(range(len(rows)), key=room.__getitem__)]


def _weights(sequences: List[Sequence], layout: Layout, trained: float, several: int) -> dict[int, float]:
    """What each trained token of a sequence counts, by the sequence's id(); of all hosts `trained`, `several` ones.

    "tokens": DAPO (arXiv 2503.14476, equation 8); "constant": Dr.GRPO (2503.20783, section 3.1); "sequences": GRPO
    (2402.03300, equation 3).
    """
    counts = {id(sequence): float(sequence.chosen.sum()) for sequence in sequences}
    if layout.normalise == "tokens":
        return dict.fromkeys(counts, 1 / max(trained, 1.0))
    if layout.normalise == "constant":
        return dict.fromkeys(counts, 1 / (several * layout.budget))
    return {key: 1 / (several * max(count, 1.0)) for key, count in counts.items()}


def empty(rows: int, length: int) -> Batch:
    """A micro-batch with nothing in it."""
    names = {field.name: np.int32 for field in dataclasses.fields(Batch)}
    names |= dict.fromkeys(("mask", "weights", "advantages", "sampler_logprobs"), np.float32)
    return Batch(**{name: np.zeros((rows, length), kind) for name, kind in names.items()})


def _fill(micro: Micro, weigh: dict[int, float]) -> Batch:
    batch = empty(micro.count, micro.length)
    for row, trees in enumerate(micro.rows):
        start, branch = 0, 0
        for segment, tree in enumerate(trees, 1):
            batch.segments[row, start : start + tree.size] = segment
            trunk = tree.members[0].prompt[:-1]
            here = np.s_[row, start : start + len(trunk)]
            batch.tokens[here], batch.positions[here] = trunk, np.arange(len(trunk))
            batch.targets[here] = tree.members[0].prompt[1:]
            start += len(trunk)
            for member in tree.members:
                branch += 1
                _place(batch, np.s_[row, start : start + len(member.response)], branch, member, weigh[id(member)])
                start += len(member.response)
    return batch


def _place(batch: Batch, here: tuple[int, slice], branch: int, sequence: Sequence, weight: float) -> None:
    chosen = sequence.chosen
    batch.branches[here] = branch
    batch.tokens[here] = np.concatenate((sequence.prompt[-1:], sequence.response[:-1]))
    batch.positions[here] = len(sequence.prompt) - 1 + np.arange(len(sequence.response))
    batch.targets[here] = sequence.response
    batch.mask[here] = chosen
    batch.weights[here] = chosen * weight
    batch.advantages[here] = sequence.advantages * chosen
    batch.sampler_logprobs[here] = np.where(chosen > 0, sequence.logprobs, 0)  # -inf where it could not be drawn
