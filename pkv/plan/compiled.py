"""One program of a plan, compiled: its memory on a chip, what it sends, and how long it takes at a guess."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from pkv.config import UserError
from pkv.plan.chips import Slice
from pkv.plan.collectives import sent_bytes
from pkv.plan.programs import Task
from pkv.plan.roofline import compute_seconds, memory_rate, sent_seconds

HOLES = 0.03  # of temporary memory, lost between arrays: 0.017 and 0.018 in the two gradients that were looked into
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


@dataclass(frozen=True)
class Program:
    """A program as planned, per call.

    kinds: bytes of a chip by kind, all that is there while it runs. host_bytes: what it keeps in the host's memory.
    flops: on all chips, by the model's own arithmetic. sent: bytes from a chip, by kind of collective.
    """

    name: str
    phase: str
    kinds: Mapping[str, float]
    limit_bytes: float
    flops: float
    sent: Mapping[str, float]
    seconds_estimate: float
    host_bytes: float = 0.0

    @property
    def bytes_per_chip(self) -> float:
        return sum(self.kinds.values())

    @property
    def lacks(self) -> float:
        """Bytes of a chip; less than 0 where there are some to spare."""
        return self.bytes_per_chip - self.limit_bytes

    @property
    def fits(self) -> bool:
        return self.lacks <= 0


def compile_program(task: Task, wanted: Slice, dtype: str = "bfloat16") -> Program:
    """Compile for the slice. dtype: of its products.

    What the compiler refuses for its memory is a program all the same, of as many bytes as it says that it needs.
    """
    limit = wanted.chip.hbm_gib * 2**30
    kinds = {kind: size for kind, size in {**task.given, **task.beside}.items() if size}
    try:
        compiled = task.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporary = refused_bytes(str(error), sum(task.given.values()))
        if temporary is None:
            raise
        return Program(task.name, task.phase, {**kinds, "activations": temporary}, limit, task.flops, {}, math.inf)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise UserError(f"{task.name}: this version of libtpu tells nothing of memory; install pkv[tpu] anew")
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    odd = memory.argument_size_in_bytes - sum(task.given.values())  # the batch, and what tiles are padded by
    kinds |= {"results": fresh, "activations": temporary_bytes(memory) + max(odd, 0.0)}
    sent = {kind: size * task.times for kind, size in sent_bytes(text).items()}
    moved = task.times * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
    seconds = max(
        compute_seconds(task.flops, wanted.chips, wanted.chip, dtype),
        moved / memory_rate(wanted.chip),
    ) + sent_seconds(sent, wanted)
    return Program(
        task.name, task.phase, kinds, limit, task.flops, sent, seconds, float(memory.host_temp_size_in_bytes)
    )


def temporary_bytes(memory: Any) -> float:
    """What a program compiled for a TPU takes beside its arguments and results, at most, from its `memory_analysis()`.

    `temp_size` can be gigabytes more than libtpu allots; what it refuses by is the peak, arguments and results and all.
    """
    return min(memory.temp_size_in_bytes, (1 + HOLES) * (memory.peak_memory_in_bytes - memory.argument_size_in_bytes))


def refused_bytes(message: str, given: float) -> float | None:
    """Bytes that a program needs beside its arguments, when the compiler refuses it for that; None for other errors.

    It says "Used 27.80G of 15.75G hbm" or "required for HLO temporaries (18.83G)", and both are of all: where arguments
    of 7 GiB and twice as much beside them were refused, that one said 21.00G.
    """
    whole = re.search(r"[Uu]sed ([\d.]+)([KMG]?)i?B? of [\d.]+[KMG]?i?B? hbm", message)
    whole = whole or re.search(r"required for HLO temporaries \(([\d.]+)([KMG]?)i?B?\)", message)
    return float(whole[1]) * _UNITS[whole[2]] - given if whole else None
