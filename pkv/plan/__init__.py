"""Will it fit: a run's real programs compiled ahead of time for a slice that is not here, with memory, time and money.

Scale on paper is a matter of this room too: see BENCHMARKS.md, "On paper".
"""

from pkv.plan.chips import Slice, read_slice
from pkv.plan.models import model_shape
from pkv.plan.planning import Plan, make_plan
from pkv.plan.programs import Work, work_of
from pkv.plan.search import nearest, search
from pkv.plan.table import as_record, in_words

__all__ = [
    "Plan",
    "Slice",
    "Work",
    "as_record",
    "in_words",
    "make_plan",
    "model_shape",
    "nearest",
    "read_slice",
    "search",
    "work_of",
]
