"""The report's page: one self-contained HTML file; everything that comes from the run is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from pkv.report.reading import COLORS, Competition, Run

# Metrics that are shares of something, shown as per cent; the rest are numbers.
_SHARES = ("accuracy", "format", "tag_structure", "winner", "judge_accuracy")
_HEADLINES = (
    ("accuracy", "right answers"),
    ("format", "all tags in order"),
    ("length/tokens", "tokens a response"),
)
_HEADLINES += (("overlap/viking", "viking's copying"), ("overlap/knight", "knight's copying"))
_TITLES = {"result": "judge", "winner": "the winner", "outside": "outside of any block"}
_SHOWN_ROLLOUTS = 3


def page(run: Run, charts: Sequence[str]) -> str:
    """The whole page. charts: `<svg>` elements."""
    colors = "".join(f".{name}{{--c:{color}}}" for name, color in COLORS.items())
    rounds = ", ".join(f"{escape(band.name)} ({band.stop - band.start} steps)" for band in run.bands)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(run.name)}: pkv report</title>
<style>{files("pkv.report").joinpath("page.css").read_text(encoding="utf-8")}{colors}</style></head><body>
<header><h1>{escape(run.name)}</h1><p>{rounds or "no step has been logged yet"}</p></header>
{_headlines(run)}
<h2>Curves</h2>
<div class="charts">{"".join(f"<figure>{chart}</figure>" for chart in charts) or "<p>Nothing to draw yet.</p>"}</div>
{_table(run)}
{_before_and_after(run)}
{_last_rollouts(run)}
</body></html>
"""


def _headlines(run: Run) -> str:
    if run.before is None:
        return ""
    before, after = run.before.metrics, run.evaluations[-1].metrics
    cards = [
        f"<div class='card'><b>{_number(key, before[key])} → {_number(key, after[key])}</b><span>{title}</span></div>"
        for key, title in _HEADLINES
        if key in before and key in after
    ]
    return f"<div class='cards'>{''.join(cards)}</div><p class='dim'>Held-out problems, {_span(run)}.</p>"


def _span(run: Run) -> str:
    names = (run.before.name if run.before else "", run.evaluations[-1].name)
    return f"{escape(names[0])} → {escape(names[1])}"


def _table(run: Run) -> str:
    """Every held-out metric, a column for each evaluation, and what changed since the warm-up."""
    if run.before is None:
        return ""
    keys = dict.fromkeys(key for evaluation in run.evaluations for key in evaluation.metrics)
    ordered = [key for key in _SHARES if key in keys] + [key for key in keys if key not in _SHARES]
    heads = "".join(f"<th>{escape(e.name)}<br><small>step {e.step}</small></th>" for e in run.evaluations)
    rows = []
    for key in ordered:
        cells = "".join(f"<td>{_number(key, e.metrics.get(key))}</td>" for e in run.evaluations)
        first, last = run.before.metrics.get(key), run.evaluations[-1].metrics.get(key)
        change = "" if first is None or last is None else _number(key, last - first, sign="+")
        rows.append(f"<tr><th>{escape(key)}</th>{cells}<td class='change'>{change}</td></tr>")
    return (
        f"<h2>Before and after</h2><div class='wide'><table><thead><tr><th>held-out</th>{heads}<th>change<br>"
        f"<small>{_span(run)}</small></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _before_and_after(run: Run) -> str:
    """The same questions, answered at each evaluation."""
    answers: dict[tuple[str, str], list[tuple[str, Competition]]] = {}
    for evaluation in run.evaluations:
        for sample in evaluation.samples:
            answers.setdefault((sample.question, sample.gold), []).append((evaluation.name, sample))
    if not answers:
        return ""
    sections = []
    for (question, gold), given in answers.items():
        # Right and complete ones first open the eye; all others stay one click away.
        folded = "".join(_competition(f"{name}", sample) for name, sample in given)
        sections.append(
            f"<section><h3>{escape(question)}</h3><p class='dim'>Gold: {escape(gold)}</p>{folded}</section>"
        )
    return f"<h2>The same questions, before and after</h2>{''.join(sections)}"


def _last_rollouts(run: Run) -> str:
    """The best and the worst responses of the newest training step on disk."""
    if not run.rollouts:
        return ""
    best, worst = run.rollouts[:_SHOWN_ROLLOUTS], run.rollouts[_SHOWN_ROLLOUTS:][-_SHOWN_ROLLOUTS:]
    shown = [("best reward", c) for c in best] + [("lowest reward", c) for c in worst]
    folded = "".join(f"<section>{_question(c.question, c.gold)}{_competition(name, c)}</section>" for name, c in shown)
    return f"<h2>From the last training step on disk</h2>{folded}"


def _question(question: str, gold: str) -> str:
    return f"<h3>{escape(question)}</h3><p class='dim'>Gold: {escape(gold)}</p>"


def _competition(title: str, competition: Competition) -> str:
    """A response that unfolds, its blocks in their owners' colours."""
    mark = {True: "<i class='yes'>✓ right</i>", False: "<i class='no'>✗ wrong</i>", None: ""}[competition.right]
    said = f" · {escape(str(competition.final_answer))}" if competition.final_answer is not None else ""
    blocks = "".join(_blocks(competition))
    return f"<details><summary>{escape(title)} {mark}{said}</summary><div class='fight'>{blocks}</div></details>"


def _blocks(competition: Competition) -> Iterable[str]:
    for segment in competition.trace.segments:
        text = competition.text[segment.chars.start : segment.chars.stop].strip()
        if not text:
            continue
        if segment.owner == "tags":
            yield f"<code>{escape(text)}</code>"
        else:
            title = _TITLES.get(segment.owner, segment.owner)
            yield f"<div class='block {segment.owner}'><b>{title}</b><p>{escape(text)}</p></div>"


def _number(key: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    if key in _SHARES:
        return f"{100 * value:{sign}.1f}" + ("" if sign else "%")
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"
