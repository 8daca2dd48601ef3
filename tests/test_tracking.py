"""A run's records: every line is kept, a resumed run's files are one never killed's, no text becomes markup."""

import html
import io
import json
import math
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pkv.config import UserError
from pkv.tracking import Progress, Tracker, cut_lines, write_rollouts
from pkv.tracking.tracker import LAYOUT, as_literal_markdown


def metrics_of(step: int) -> dict:
    return {"round": "format", "phase": "grpo", "reward/total": step / 2, "accuracy": np.float32(0.5), "samples": 8}


def row_of(sample: int) -> dict:
    return {
        "round": "format",
        "problem_id": "p1",
        "question": "How many?",
        "gold": "24",
        "sample": sample,
        "text": "<competition>",
        "total": 1.5,
        "rewards": {"winner": 1.0, "correctness": None},
        "advantages": {"pirate": np.float32(0.25)},
        "errors": ["missing"],
        "finish": "stop",
        "tokens": np.array([1, 2, 3], np.int32),
        "policy_step": 3,
        "facts": {"fighters": {"pirate": "24"}, "overlap/knight": np.float32(0.5)},
    }


def charts_of(run_dir):
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_a_line_a_step_holds_what_was_logged(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(0, metrics_of(0))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before close
        tracker.log(1, metrics_of(1) | {"loss": math.nan})
    assert [json.loads(line) for line in lines] == [{"step": 0} | metrics_of(0) | {"accuracy": 0.5}]
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert "NaN" not in last and json.loads(last)["loss"] is None


def test_tensorboard_gets_the_same_numbers_and_the_layout(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in range(3):
            tracker.log(step, metrics_of(step))
        tracker.text(2, "samples/first", "<b>hi</b>")
    charts = charts_of(tmp_path)
    assert [(e.step, e.value) for e in charts.Scalars("reward/total")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert "round" not in charts.Tags()["scalars"]
    assert any("samples/first" in tag for tag in charts.Tags()["tensors"])
    assert any("custom_scalars" in tag for tag in charts.Tags()["tensors"])


def test_the_layout_finds_the_charts_that_matter():
    patterns = {title: tags for title, (_, tags) in LAYOUT["pkv"].items()}

    def charts(tag):
        return [title for title, tags in patterns.items() if any(re.search(pattern, tag) for pattern in tags)]

    assert charts("reward/winner") == ["rewards"]
    assert charts("accuracy") == charts("competition_format") == ["accuracy and format"]
    assert charts("length/knight") == charts("length/tokens") == ["lengths by fighter, tokens"]
    assert charts("overlap/viking") == ["copying (overlap)"]
    assert charts("perf/tokens_per_s") == ["tokens per second"]
    assert charts("perf/update_s") == ["seconds by phase"]


def test_killed_and_resumed_files_are_those_of_a_run_never_killed(tmp_path):
    for name, kills in (("whole", []), ("killed", [(6, 4), (5, 2), (3, 0)])):
        start = 0
        for stop, resume in [*kills, (8, None)]:
            tracker = Tracker(tmp_path / name, resume_step=start)
            for step in range(start, stop):
                tracker.log(step, metrics_of(step))
                write_rollouts(tmp_path / name, step, [row_of(0)])
            tracker.close()
            if resume is not None:
                with (tmp_path / name / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 1, "rew')  # torn by the kill
                start = resume
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 8
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    assert sorted(f.name for f in whole.glob("rollouts/*")) == sorted(f.name for f in killed.glob("rollouts/*"))
    steps = [event.step for event in charts_of(killed).Scalars("reward/total")]
    assert steps == list(range(8))


def test_resuming_removes_rollouts_that_will_be_made_again(tmp_path):
    for step in (1, 2, 3):
        for host in (0, 1):
            write_rollouts(tmp_path, step, [row_of(0)], host)
    Tracker(tmp_path, resume_step=2).close()
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == [
        "step-000001-host-1.parquet",
        "step-000001.parquet",
    ]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        cut_lines(file, 1)
    assert file.read_text().count("\n") == 3


def test_rollouts_come_back_from_parquet(tmp_path):
    file = write_rollouts(tmp_path, 123, [row_of(0), row_of(1) | {"rewards": {"extra": 2.0}, "errors": []}])
    empty = write_rollouts(tmp_path, 124, [])
    assert file == tmp_path / "rollouts" / "step-000123.parquet"
    assert sorted(f.name for f in file.parent.iterdir()) == ["step-000123.parquet", "step-000124.parquet"]
    first, second = parquet.read_table(file).to_pylist()
    assert first["step"] == 123 and first["tokens"] == [1, 2, 3] and first["errors"] == ["missing"]
    assert first["reward/winner"] == 1.0 and first["reward/correctness"] is None and first["reward/extra"] is None
    assert second["reward/extra"] == 2.0 and second["errors"] == []
    assert first["advantage/pirate"] == 0.25
    assert json.loads(first["facts"]) == {"fighters": {"pirate": "24"}, "overlap/knight": 0.5}
    assert parquet.read_table(empty).num_rows == 0


PRINTABLE = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]) | st.sampled_from("\n \t")
)
NASTY = [
    "![x](http://example.org/a.png)",
    "![x][1]\n\n[1]: http://example.org/a.png",
    "<img src=x onerror=alert(1)>",
    "<http://example.org>",
    "    code\n# title\n- item\n1. one\n> quote\n---\n| a | b |\n|---|---|",
    "```\nfence\n```",
    "<competition>\n<pirate>2 < 3 & 5 > 4</pirate>",
    "a * b * c _d_ \\(x\\) `y` &amp; &#60;",
    "\x02klzzwxh:0000\x03",
]


def shown_by_tensorboard(text: str) -> str:
    rendered = plugin_util.markdown_to_safe_html(as_literal_markdown(text))
    assert set(re.findall(r"<(/?\w+)", rendered)) <= {"p", "/p", "br"}, rendered
    body = re.sub(r"</?p>", "", rendered).replace("<br>", "\n")
    return html.unescape(body).replace("\xa0", " ")


@pytest.mark.parametrize("text", NASTY)
def test_tensorboard_shows_hostile_text_letter_by_letter(text):
    shown = shown_by_tensorboard(text)
    assert shown.strip() == re.sub("[\x02\x03]", "�", text).strip()


@given(PRINTABLE)
def test_tensorboard_shows_any_text_letter_by_letter(text):
    assert shown_by_tensorboard(text).split() == text.split()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_lines_are_few_and_plain():
    now = [0.0]
    stream = io.StringIO()
    with Progress(100, "round format", stream=stream, every_s=10, clock=lambda: now[0]) as progress:
        for step in range(100):
            now[0] += 1.0
            progress.advance(step=step, reward=1.23456, accuracy=0.5, tokens_per_s=1234.5, absent=None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11 and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[0] == "round format 1/100, 01:39 left, step 0, reward 1.23, accuracy 50%, 1,234 tokens/s"
    assert lines[-1] == "round format 100/100, step 99, reward 1.23, accuracy 50%, 1,234 tokens/s"


def test_on_a_terminal_the_bar_shows_what_matters():
    stream = Terminal()
    with Progress(3, "warm-up", initial=1, stream=stream) as progress:
        progress.advance(round="format", reward=0.5)
        progress.note("saved")
        progress.advance(round="format", reward=0.75)
    assert (
        "3/3" in stream.getvalue() and "round format, reward 0.75" in stream.getvalue() and "saved" in stream.getvalue()
    )


def test_what_is_over_soon_shows_nothing():
    for stream in (io.StringIO(), Terminal()):
        now = [0.0]
        with Progress(3, "loading", stream=stream, delay_s=2, clock=lambda now=now: now[0]) as progress:
            for _ in range(3):
                now[0] += 0.5
                progress.advance()
        assert stream.getvalue() == ""
    stream, now = io.StringIO(), [0.0]
    with Progress(3, "loading", stream=stream, delay_s=2, clock=lambda: now[0]) as progress:
        for _ in range(3):
            now[0] += 1.5
            progress.advance()
    assert [line.partition(",")[0] for line in stream.getvalue().splitlines()] == ["loading 2/3", "loading 3/3"]
