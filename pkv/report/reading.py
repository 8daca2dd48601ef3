"""A run directory as data for the report: metrics, evaluations, competitions, and what is plotted. No drawing here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pkv.competition import parse
from pkv.config import UserError
from pkv.records import BLOCKS, FIGHTERS, Trace
from pkv.tracking import read_jsonl

COLORS = {
    "pirate": "#c2413b",
    "knight": "#2f69a8",
    "viking": "#d08a1d",
    "result": "#6c6f7d",
    "winner": "#6c6f7d",
    "answer": "#24806c",
    "outside": "#b0356f",
}
WARMUP = "warm-up"


@dataclass(frozen=True)
class Competition:
    """One response worth reading. right None: not known."""

    question: str
    gold: str
    text: str
    right: bool | None = None
    final_answer: str | None = None

    @cached_property
    def trace(self) -> Trace:
        return parse(self.text)

    @property
    def is_complete(self) -> bool:
        """Whether every block is there with something in it."""
        return all((self.trace.block_text(name) or "").strip() for name in BLOCKS)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out problems."""

    step: int
    name: str
    metrics: Mapping[str, float]
    samples: tuple[Competition, ...]


@dataclass(frozen=True)
class Band:
    """The steps [start, stop) of a round, or of the warm-up."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Series:
    """One line of a chart. training: a noisy value at every step; otherwise a point at every evaluation."""

    label: str
    color: str
    steps: Sequence[int]
    values: Sequence[float]
    training: bool = True


@dataclass(frozen=True)
class Chart:
    """What one pair of axes shows."""

    title: str
    unit: str
    series: tuple[Series, ...]
    share: bool = False  # values from 0 to 1, shown as per cent


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    folder: Path
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    rollouts: tuple[Competition, ...] = field(default=())  # of the newest step that kept some, best reward first

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The warm-up and the rounds, in order, without gaps."""
        named = [(WARMUP if m.get("phase") == "warmup" else str(m.get("round") or ""), m["step"]) for m in self.metrics]
        starts = [(name, next(lines)[1]) for name, lines in itertools.groupby(named, key=lambda pair: pair[0])]
        starts.append(("", max((step for _, step in named), default=-1) + 1))
        following = itertools.pairwise(starts)
        return tuple(Band(name, start, stop) for (name, start), (_, stop) in following if stop > start)

    @property
    def before(self) -> Evaluation | None:
        """The evaluation that the rounds are measured against: the warm-up's, else the first."""
        warm = (e for e in self.evaluations if e.name == f"after {WARMUP}")
        return next(warm, self.evaluations[0] if self.evaluations else None)

    def best_competition(self) -> Competition | None:
        """The complete competition to show to somebody who sees only one: right if possible, of the highest reward.

        From the newest rollouts; where none was kept, the newest held-out answer.
        """
        best_first = list(self.rollouts) + [s for e in reversed(self.evaluations) for s in e.samples]
        complete = [c for c in best_first if c.is_complete]
        return next((c for c in complete if c.right), complete[0] if complete else None)


def read_run(folder: Path) -> Run:
    """Read metrics.jsonl, evaluations.jsonl and the newest rollouts; the last two may be absent. Raises UserError."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl in it; expected a run directory written by `pkv train`")
    metrics = [line for line in read_jsonl(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    evaluations = [_evaluation(line) for line in read_jsonl(folder / "evaluations.jsonl")]
    return Run(folder, tuple(metrics), tuple(evaluations), tuple(_newest_rollouts(folder)))


def charts(run: Run) -> tuple[Chart, ...]:
    """The charts that matter, in order of interest; a value that a run lacks is left out, an empty chart too."""
    possible = (
        Chart(
            "Held-out problems",
            "share of problems",
            (
                _held_out(run, "right answer", COLORS["answer"], "accuracy"),
                _held_out(run, "all tags in order", "#7a4fa3", "format"),
            ),
            share=True,
        ),
        Chart("Reward", "mean total a response", (_training(run, "reward/total", "reward", "#33363f"),)),
        Chart(
            "Length by fighter",
            "tokens",
            tuple(_training(run, f"length/{name}", name, COLORS[name]) for name in FIGHTERS),
        ),
        Chart(
            "Copying",
            "overlap with earlier fighters",
            tuple(_training(run, f"overlap/{name}", name, COLORS[name]) for name in ("knight", "viking")),
            share=True,
        ),
        Chart("Length of a response", "tokens", (_training(run, "length/tokens", "response", "#33363f"),)),
        Chart(
            "Training problems",
            "share of responses",
            (
                _training(run, "accuracy", "right answer", COLORS["answer"]),
                _training(run, "format", "all tags in order", "#7a4fa3"),
            ),
            share=True,
        ),
        Chart("Entropy", "nats a token", (_training(run, "policy/entropy", "policy", "#33363f"),)),
        Chart("Speed", "tokens a second", (_training(run, "perf/tokens_per_s", "sampled and scored", "#33363f"),)),
    )
    filled = (Chart(c.title, c.unit, tuple(s for s in c.series if s.steps), c.share) for c in possible)
    return tuple(chart for chart in filled if chart.series)


def _training(run: Run, key: str, label: str, color: str) -> Series:
    # The warm-up's demonstrations are not the model's own: only what GRPO saw is drawn.
    points = [(m["step"], m[key]) for m in run.metrics if m.get("phase") != "warmup" and _is_number(m.get(key))]
    return Series(label, color, [step for step, _ in points], [value for _, value in points])


def _held_out(run: Run, label: str, color: str, *keys: str) -> Series:
    points = [(e.step, next((e.metrics[k] for k in keys if k in e.metrics), None)) for e in run.evaluations]
    known = [(step, value) for step, value in points if value is not None]
    return Series(label, color, [step for step, _ in known], [value for _, value in known], training=False)


def _evaluation(line: Mapping[str, Any]) -> Evaluation:
    metrics = {name: float(value) for name, value in (line.get("metrics") or {}).items() if _is_number(value)}
    samples = tuple(
        Competition(
            question=str(sample.get("question", "")),
            gold=str(sample.get("gold", "")),
            text=str(sample.get("completion", "")),
            right=sample.get("right"),
            final_answer=sample.get("final_answer"),
        )
        for sample in line.get("samples") or ()
    )
    return Evaluation(int(line.get("step") or 0), str(line.get("name") or "evaluation"), metrics, samples)


def _newest_rollouts(folder: Path) -> list[Competition]:
    import pyarrow.parquet as parquet

    files = sorted(folder.glob("rollouts/step-*.parquet"))
    if not files:
        return []
    newest = files[-1].stem[: len("step-000000")]  # of several hosts each has written its own
    rows = [row for file in files if file.stem.startswith(newest) for row in parquet.read_table(file).to_pylist()]
    rows.sort(key=lambda row: -(row.get("total") or 0.0))
    return [_rollout(row) for row in rows]


def _rollout(row: Mapping[str, Any]) -> Competition:
    correctness = row.get("reward/correctness")
    right = None if correctness is None else correctness > 0.5
    question, gold, text = (row.get(name) or "" for name in ("question", "gold", "text"))
    return Competition(question, gold, text, right, row.get("final_answer"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
