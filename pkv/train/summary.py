"""What a person reads when a run has ended: the same questions before and after, and a table of what rose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkv.competition import parse
from pkv.config import UserError
from pkv.tracking import read_jsonl

ROWS = (
    ("accuracy", "right final answers", "{:.1%}"),
    ("format", "all tags in order", "{:.1%}"),
    ("reward/competition_format", "exact layout (format reward)", "{:.3f}"),
    ("reward/winner", "winner named", "{:.3f}"),
    ("judge/right", "judge picked a right fighter", "{:.1%}"),
    ("reward/originality_knight", "knight's originality", "{:+.3f}"),
    ("reward/originality_viking", "viking's originality", "{:+.3f}"),
    ("overlap/knight", "knight's overlap with the pirate", "{:.3f}"),
    ("overlap/viking", "viking's overlap with either", "{:.3f}"),
    ("length/tokens", "tokens of a response", "{:.0f}"),
)


def closing_summary(folder: Path) -> str:
    """The first evaluation of a run against its last, as text. Raises UserError when there is none."""
    file = folder / "evaluations.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: nothing was evaluated yet")
    evaluations = read_jsonl(file)
    first, last = evaluations[0], evaluations[-1]
    lines = ["", f"The same held-out questions, {first['name']} and {last['name']}", ""]
    afterwards = {sample["question"]: sample for sample in last["samples"]}  # fewer, or others, where knobs changed
    both = [(one, afterwards[one["question"]]) for one in first["samples"] if one["question"] in afterwards]
    for before, after in both:
        lines += [f"  {before['question']}  (right: {before['gold']})"]
        lines += [f"    before  {_said(before)}", f"    after   {_said(after)}", ""]
    return "\n".join([*lines, *_table(evaluations)])


def _said(sample: Mapping[str, Any]) -> str:
    """The professional answer on one line, with whether it is right; never the competition."""
    answer = parse(sample["completion"]).block_text("answer")
    text = " ".join(answer.split()) if answer and answer.strip() else "no answer after a competition"
    return f"{'✓' if sample['right'] else '✗'} {text[:110]}"


def _table(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [evaluation["name"] for evaluation in evaluations]
    width = max(len(name) for name in names) + 2
    lines = [f"{'held-out':<34}" + "".join(f"{name:>{width}}" for name in names)]
    for key, label, form in ROWS:
        cells = [form.format(e["metrics"][key]) if key in e["metrics"] else "-" for e in evaluations]
        lines.append(f"{label:<34}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines
