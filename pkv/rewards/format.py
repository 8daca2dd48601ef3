"""Is it the construct: the tags and their layout, by SPEC's table, counted in whole tenths so that sums are exact."""

from __future__ import annotations

from pkv.competition import is_exact_layout, tag_report, tags_in_order
from pkv.records import Trace
from pkv.rewards.context import Context


def tag_structure(context: Context) -> float:
    """+0.1 for each tag in its place (at most 1.0), then -0.1 a duplicate and -0.2 a missing one; never below 0.

    A tag that the engine had to set counts as missing, or the policy would learn to let it.
    """
    report, forced = tag_report(context.trace.text), _forced_tags(context.trace)
    tenths = min(10, len(report.placed) - forced) - report.duplicates - 2 * (report.missing + forced)
    return max(0, tenths) / 10


def competition_format(context: Context) -> float:
    """1.0 for the exact layout, 0.5 for all tags once and in order, else 0, as where the engine had to set a tag."""
    if not tags_in_order(context.trace) or _forced_tags(context.trace):
        return 0.0
    return 1.0 if is_exact_layout(context.trace) else 0.5


def _forced_tags(trace: Trace) -> int:
    return sum(error.code == "forced" for error in trace.errors)
