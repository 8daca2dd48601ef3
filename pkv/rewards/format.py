"""Is it the construct: the tags and their layout, by SPEC's table, counted in whole tenths so that sums are exact."""

from __future__ import annotations

from pkv.competition import is_exact_layout, tag_report, tags_in_order
from pkv.rewards.context import Context


def tag_structure(context: Context) -> float:
    """+0.1 for each tag in its place (at most 1.0), then -0.1 a duplicate and -0.2 a missing one; never below 0."""
    report = tag_report(context.trace.text)
    tenths = min(10, len(report.placed)) - report.duplicates - 2 * report.missing
    return max(0, tenths) / 10


def competition_format(context: Context) -> float:
    """1.0 for the exact layout, 0.5 for all tags once and in order, else 0."""
    if is_exact_layout(context.trace):
        return 1.0
    return 0.5 if tags_in_order(context.trace) else 0.0
