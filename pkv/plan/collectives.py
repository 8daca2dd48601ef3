"""What a compiled program sends between chips, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# How many times its size a chip sends of a collective's operand or result in a ring of g chips (bidirectional rings
# halve the time, which the bandwidth of all links of a chip accounts for).
_SENT = {
    "all-gather": lambda size, g: size * (g - 1) / g,  # size: of the result
    "reduce-scatter": lambda size, g: size * (g - 1),  # of the result, which is 1/g of the operand
    "all-reduce": lambda size, g: 2 * size * (g - 1) / g,
    "all-to-all": lambda size, g: size * (g - 1) / g,
    "ragged-all-to-all": lambda size, g: size * (g - 1) / g,
    "collective-permute": lambda size, g: size,
}
NETWORK = "over slices"  # the kind of what goes over the data centre's network, and not over links
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\dm\d(?:fn)?)?|pred)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_TURNS = re.compile(r'"known_trip_count":\{"n":\s*"?(\d+)')
_SCATTER = "all-reduce-scatter"  # a fusion that a TPU does as a reduce-scatter: of an all-reduce's two rounds the first
_OVER_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="ALL_REDUCE"')
_CHAIN = re.compile(r"channel_id=(\d+),.*frontend_attributes=\{[^}]*chain_id=")
_LOOP = re.compile(r"\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))")


@dataclass
class _Computation:
    """sent: bytes by kind of collective. chains: those of collectives that several computations do a part of each, by
    channel. calls: other computations. loops: condition, body, and turns where they are said. largest: of its whole
    constants; a loop counts up to its condition's.
    """

    sent: dict[str, float] = field(default_factory=dict)
    chains: dict[str, tuple[str, float]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, str, float | None]] = field(default_factory=list)
    largest: float = 1.0


def sent_bytes(text: str) -> dict[str, float]:
    """Bytes that each chip sends in one call of a compiled program, by kind of collective; `NETWORK` is a kind.

    text: from `Compiled.as_text()`. What chips of several slices add up is first summed in each slice, and then handed
    to the network, by which a TPU's program has a `send` and a `recv`: its collectives are of one slice alone. A loop
    whose turns the compiler doesn't say is taken to count up to the constant in its condition: the sampler's may end
    before, when no row is left. A TPU does some collectives piece by piece among other work, and every piece stands in
    the text as the whole one: such a chain counts as often as it begins.
    """
    computations, entry = _read(text)
    total: dict[str, float] = {}
    pieces: dict[str, dict[str, float]] = {}  # of a chain, how often each computation does its piece

    def add(name: str, times: float) -> None:
        computation = computations.get(name, _Computation())
        for channel in computation.chains:
            done = pieces.setdefault(channel, {})
            done[name] = done.get(name, 0.0) + times
        for kind, size in computation.sent.items():
            total[kind] = total.get(kind, 0.0) + times * size
        for called in computation.calls:
            add(called, times)
        for condition, body, turns in computation.loops:
            add(body, times * (turns or counted(condition)))

    def counted(name: str) -> float:
        computation = computations.get(name, _Computation())
        return max([computation.largest, *map(counted, computation.calls)])

    add(entry, 1.0)
    for channel, done in pieces.items():
        name = min(done, key=done.__getitem__)
        kind, size = computations[name].chains[channel]
        total[kind] = total.get(kind, 0.0) + done[name] * size
    return total


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the one that a call starts with."""
    found: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and not line.startswith("HloModule"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%").partition("(")[0]
            current = found.setdefault(name, _Computation())
            entry = name if line.startswith("ENTRY ") else entry
        elif match := _INSTRUCTION.match(line):
            _note(current, match[2])
    for name, computation in found.items():
        if name.startswith(_SCATTER) and "all-reduce" in computation.sent:
            computation.sent["reduce-scatter"] = computation.sent.pop("all-reduce") / 2
    return found, entry


def _note(computation: _Computation, instruction: str) -> None:
    """Add an instruction's own sending, and what it calls."""
    operation = _OPERATION.search(instruction)
    if operation is None:
        return
    kind = operation[1].removesuffix("-start")
    if kind == "send" and "_xla_megascale" in instruction:
        sent = computation.sent.get(NETWORK, 0.0) + _over_slices(instruction, instruction[: operation.start()])
        computation.sent[NETWORK] = sent
    if kind in _SENT and not operation[1].endswith("-done"):
        result, group = instruction[: operation.start()], _group_size(instruction)
        sizes = list(_sizes(result))
        # An asynchronous one's result holds its operand too, and counters: the largest array is what moves, but for a
        # reduce-scatter, whose result is the smaller of the two.
        largest = max(sizes, default=0)
        if operation[1] == "reduce-scatter-start":
            largest = largest / group
        elif result.lstrip().startswith("(") and not operation[1].endswith("-start"):
            largest = sum(sizes)  # several arrays at once
        if chain := _CHAIN.search(instruction):
            computation.chains[chain[1]] = kind, _SENT[kind](largest, group)
        else:
            computation.sent[kind] = computation.sent.get(kind, 0.0) + _SENT[kind](largest, group)
    if loop := _LOOP.search(instruction):
        turns = _TURNS.search(instruction)
        computation.loops.append((loop[1], loop[2], float(turns[1]) if turns else None))
    for several, one in _CALLED.findall(instruction):
        computation.calls += [name.strip().lstrip("%") for name in (one or several).split(",")]
    if constant := _CONSTANT.match(instruction):
        computation.largest = max(computation.largest, float(constant[1]))


def _over_slices(instruction: str, result: str) -> float:
    """Bytes that a chip sends of a sum over slices."""
    found = _OVER_SLICES.search(instruction)
    if found is None:
        raise ValueError(f"what is sent over slices can't be read: {instruction.strip()}")
    return _SENT["all-reduce"](next(_sizes(result)), len(found[1].split(",")))


def _sizes(result: str) -> Iterator[float]:
    for kind, shape in _ARRAY.findall(result):
        if kind in _BYTES:
            yield math.prod(int(size) for size in shape.split(",") if size) * _BYTES[kind]


def _group_size(instruction: str) -> int:
    """Chips in a group: replica_groups={{0,1},{2,3}}, [2,2]<=[4], or mesh['x'=8,'y'=2] {'y','x':(2)4}, in which of the
    8 by x only 4 are in a group; a permutation has pairs."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction):
        return int(counted[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", instruction):
        sizes = dict(re.findall(r"'?([^',=]+)'?=(\d+)", named[1]))
        axes = re.findall(r"'?([^',:]+)'?(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if "source_target_pairs=" in instruction:
        return 2
    raise ValueError(f"a collective whose groups of chips can't be read: {instruction.strip()}")
