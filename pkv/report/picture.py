"""One competition as a picture that can be read: question, three fighters side by side, judge, answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

from pkv.records import FIGHTERS
from pkv.report.reading import COLORS, Competition

# Inches, but for font sizes in points.
_WIDTH, _MARGIN, _GAP, _PAD = 12.0, 0.35, 0.22, 0.2
_SIZE, _LINE, _HEAD = 10.5, 0.205, 0.34
_MOST_LINES = 30  # of a panel; a trace of thousands of tokens is shown by its beginning
_TITLES = {"pirate": "Pirate", "knight": "Knight", "viking": "Viking", "result": "Judge", "answer": "Answer"}


@dataclass(frozen=True)
class _Panel:
    """A box with a coloured head; `lines` are already broken."""

    title: str
    color: str
    lines: tuple[str, ...]
    left: float
    width: float

    @property
    def height(self) -> float:
        return _HEAD + _PAD * 1.4 + len(self.lines) * _LINE


def draw_competition(competition: Competition, file: Path) -> None:
    """Draw a complete competition as PNG; long blocks are cut with a note of how much is left."""
    figure = Figure(figsize=(_WIDTH, 1))
    measure = _measure(figure)
    rows = _rows(competition, measure)
    question = _break(competition.question, _WIDTH - 2 * _MARGIN, measure, 13.0)[:6]
    heights = [max(panel.height for panel in row) for row in rows]
    top = _MARGIN + 0.3 + len(question) * 0.27 + 0.12
    height = top + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN
    figure.set_size_inches(_WIDTH, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        axes.text(x, y, text, parse_math=False, **({"fontsize": _SIZE, "color": "#22242b", "va": "top"} | style))

    write(_MARGIN, _MARGIN - 0.05, "THE QUESTION", fontsize=8.5, color="#6c6f7d", fontweight="bold")
    for number, line in enumerate(question):
        write(_MARGIN, _MARGIN + 0.2 + number * 0.27, line, fontsize=13)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for panel in row:
            for patch in _boxes(panel, y, row_height):
                axes.add_patch(patch)
            head = {"fontsize": 11, "color": "white", "fontweight": "bold", "va": "center_baseline"}
            write(panel.left + _PAD, y + _HEAD / 2, panel.title, **head)
            for number, line in enumerate(panel.lines):
                write(panel.left + _PAD, y + _HEAD + 0.7 * _PAD + number * _LINE, line)
        y += row_height + _GAP
    figure.savefig(file, dpi=150, facecolor="white")


def _rows(competition: Competition, measure: Callable[[str, float], float]) -> list[list[_Panel]]:
    trace = competition.trace
    winner = (trace.block_text("winner") or "").strip().lower()

    def panel(name: str, text: str, left: float, width: float) -> _Panel:
        title = _TITLES[name]
        if name == winner:
            title += "  ★ winner"
        if name == "result":
            title += f"  →  {winner}"
        if name == "answer" and competition.right is not None:
            title += "  ✓ right" if competition.right else f"  ✗ wrong (gold: {competition.gold})"
        lines = _break(text, width - 2 * _PAD, measure, _SIZE)
        if len(lines) > _MOST_LINES:
            lines = [*lines[: _MOST_LINES - 1], f"… ({len(lines) - _MOST_LINES + 1} more lines)"]
        return _Panel(title, COLORS[name], tuple(lines), left, width)

    full = _WIDTH - 2 * _MARGIN
    third = (full - 2 * _GAP) / 3
    fighters = [
        panel(name, trace.block_text(name) or "", _MARGIN + place * (third + _GAP), third)
        for place, name in enumerate(FIGHTERS)
    ]
    judge = (trace.block_text("result") or "").partition("<winner>")[0]
    return [
        fighters,
        [panel("result", judge, _MARGIN, full)],
        [panel("answer", trace.block_text("answer") or "", _MARGIN, full)],
    ]


def _boxes(panel: _Panel, y: float, height: float) -> list[FancyBboxPatch]:
    """The panel's tinted body and its head; the head's lower corners are covered by a square one."""

    def box(top: float, tall: float, alpha: float, round_: bool = True) -> FancyBboxPatch:
        style = "round,pad=0,rounding_size=0.09" if round_ else "square,pad=0"
        look = {"facecolor": panel.color, "alpha": alpha, "linewidth": 0, "snap": False}
        return FancyBboxPatch((panel.left, top), panel.width, tall, boxstyle=style, **look)

    return [box(y, height, 0.11), box(y, _HEAD, 1.0), box(y + _HEAD / 2, _HEAD / 2, 1.0, round_=False)]


def _measure(figure: Figure) -> Callable[[str, float], float]:
    """A function that gives a word's width in inches at a font size."""
    renderer = FigureCanvasAgg(figure).get_renderer()

    @functools.cache  # a competition has few different words
    def width(word: str, size: float) -> float:
        font = FontProperties(family="DejaVu Sans", size=size)
        return renderer.get_text_width_height_descent(word, font, False)[0] / figure.dpi

    return width


def _break(text: str, width: float, measure: Callable[[str, float], float], size: float) -> list[str]:
    """Text broken into lines of at most `width` inches; a word that is longer than a line is broken too."""
    lines: list[str] = []
    space = measure(" ", size)
    for paragraph in text.strip().splitlines():
        line, used = "", 0.0
        for word in paragraph.split():
            while measure(word, size) > width:
                fits = max(1, int(len(word) * width / measure(word, size)) - 1)
                lines += [line, word[:fits]] if line else [word[:fits]]
                line, used, word = "", 0.0, word[fits:]
            if line and used + space + measure(word, size) > width:
                lines.append(line)
                line, used = "", 0.0
            used += measure(word, size) + (space if line else 0.0)
            line = f"{line} {word}" if line else word
        lines.append(line)
    return lines
