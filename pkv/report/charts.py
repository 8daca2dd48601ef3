"""Curves drawn with matplotlib: one picture for a README, one SVG a chart for the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pkv.report.reading import WARMUP, Band, Chart, Run, Series

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#9a9ca5",
    "axes.labelcolor": "#4a4d57",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#6c6f7d",
    "ytick.color": "#6c6f7d",
    "text.color": "#22242b",
}
_WARMUP_SHARE = 0.12  # of the width; a warm-up has many steps and nothing in these charts


def draw_curves(run: Run, charts: Sequence[Chart], file: Path) -> None:
    """The first four charts as one PNG."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.04, wspace=0.03)  # type: ignore[union-attr]
        figure.suptitle(f"{run.name}: learning to compete", fontsize=14, fontweight="bold", parse_math=False)
        for place, chart in enumerate(charts[:4], 1):
            _draw(figure.add_subplot(2, 2, place), chart, run.bands)
        if not charts:
            figure.text(0.5, 0.5, "no step has been logged yet", ha="center")
        figure.savefig(file, dpi=160, facecolor="white")


def draw_charts(run: Run, charts: Sequence[Chart]) -> list[str]:
    """Every chart as an `<svg>` element that stands by itself."""
    drawn = []
    for chart in charts:
        style: dict[Any, Any] = _STYLE | {"svg.hashsalt": f"pkv {chart.title}"}  # ids that no other chart has
        with rc_context(style):
            figure = Figure(figsize=(5.6, 3.4), layout="constrained")
            _draw(figure.add_subplot(), chart, run.bands)
            stream = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
        drawn.append(stream.getvalue()[stream.getvalue().index("<svg") :])
    return drawn


def _draw(axes: Axes, chart: Chart, bands: Sequence[Band]) -> None:
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold", pad=22)
    for series in chart.series:
        _draw_series(axes, series)
    axes.set_xlabel("training step")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.grid(axis="y", color="#e4e5ea", linewidth=0.8)
    axes.set_axisbelow(True)
    if chart.share:
        top = max(max(series.values) for series in chart.series)
        axes.set_ylim(0, 1.04 if top > 0.5 else max(0.1, 1.25 * top))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif min(min(series.values) for series in chart.series) >= 0:
        axes.set_ylim(bottom=0)
    _draw_bands(axes, bands, chart)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1.075), ncols=3, borderaxespad=0)


def _draw_series(axes: Axes, series: Series) -> None:
    steps, values = np.asarray(series.steps), np.asarray(series.values, float)
    if not series.training:
        axes.plot(steps, values, color=series.color, linewidth=2, marker="o", markersize=5.5, label=series.label)
        return
    if len(steps) > 4:
        axes.plot(steps, values, color=series.color, linewidth=0.9, alpha=0.28)
        values = _smooth(values)
    axes.plot(steps, values, color=series.color, linewidth=2, label=series.label)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a fifteenth of the run, narrower at the ends."""
    window = np.ones(2 * max(1, len(values) // 30) + 1)
    counts = np.convolve(np.ones_like(values), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def _draw_bands(axes: Axes, bands: Sequence[Band], chart: Chart) -> None:
    """Rounds as shaded stripes with their names above; of a long warm-up only the end is shown."""
    if not bands:
        return
    last = max([bands[-1].stop, *(max(series.steps) for series in chart.series)])
    first = bands[0].start
    rounds = [band for band in bands if band.name != WARMUP]
    if rounds and bands[0].name == WARMUP:
        width = last - rounds[0].start
        first = max(first, rounds[0].start - max(1, round(width * _WARMUP_SHARE / (1 - _WARMUP_SHARE))))
    margin = 0.01 * max(1, last - first)
    axes.set_xlim(first - margin, last + margin)
    for place, band in enumerate(bands):
        start, stop = max(band.start, first), band.stop
        if stop <= start:
            continue
        shade = "#f1ece2" if band.name == WARMUP else ("#eef1f6", "#f8f9fb")[place % 2]
        axes.axvspan(start, stop, color=shade, zorder=0, linewidth=0)
        axes.annotate(
            band.name,
            ((start + stop) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=8,
            color="#6c6f7d",
            annotation_clip=False,
            parse_math=False,
        )
