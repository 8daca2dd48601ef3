"""Will it fit: a run's real programs compiled for a slice that is not here, with memory, time and money.

Scale on paper, in words (tables: BENCHMARKS.md, by benchmarks/scale.py): at a fixed step of 512 rollouts decoding takes
most of it, and from some 128 chips on hardly more than the longest response does, each of whose tokens reads all
weights. With rollouts that grow with the chips, one prompt a machine at least, a step keeps its length up to 4,096
chips: of a gradient that crosses a network between slices a chip sends its own part, and fsdp makes that small. More
chips want more rollouts a step, sampling one step off, and weights in 8 bits.
"""

from __future__ import annotations

import sys
from types import ModuleType

from pkv.config import Config
from pkv.plan.chips import Slice, read_slice
from pkv.plan.models import model_shape
from pkv.plan.planning import Plan, make_plan, plan
from pkv.plan.programs import Work, work_of
from pkv.plan.search import ADAPTERS, find, quicker
from pkv.plan.table import as_record, in_words

__all__ = [
    "ADAPTERS",
    "Plan",
    "Slice",
    "Work",
    "as_record",
    "find",
    "in_words",
    "make_plan",
    "model_shape",
    "quicker",
    "read_slice",
    "work_of",
]


class _Room(ModuleType):
    """This package, which can be called: `pkv.plan(config, "v5e:4x8")` and `pkv.plan.planning` share one name."""

    def __call__(self, config: Config, topology: str, prompt_tokens: int | None = None) -> Plan:
        return plan(config, topology, prompt_tokens)


sys.modules[__name__].__class__ = _Room
