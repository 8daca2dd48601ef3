"""The report: one file that asks nothing of the network, in which the run's texts are only ever text."""

import builtins
import json
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from pkv.competition import compose
from pkv.config import UserError
from pkv.report import write_report
from pkv.report.reading import charts, read_run
from pkv.tracking import Tracker, write_rollouts

ROUNDS = (("format", 20), ("aha", 20), ("longer", 20))
WARMUP_STEPS = 150


def competition(final: str, winner: str = "knight") -> str:
    return compose(
        {
            "pirate": f"Arr, ye bilge rats! 4 candles a hive: 96 / 4 = {final}. The treasure be {final} hives!",
            "knight": f"By mine honour, one candle wants 1/4 hive, so 96 candles want 96 x 1/4 = {final} hives.",
            "viking": f"Skal! I hew 96 into 80 and 16: 20 hives and 4 hives. By Odin, {final} in all!",
        },
        f"The pirate shouted. The knight reckoned. The viking hewed. All three reached {final}; how thrilling. "
        f"4 x {final} gives 96, so the arithmetic holds. The knight wasted the fewest words.",
        winner,
        f"You need {final} hives to make 96 candles.",
    )


def write_run(folder, question="A hive gives wax for 4 candles. How many hives for 96 candles?", text=None):
    """A small run with a warm-up and three rounds, written as the training loop writes it."""
    rng = np.random.default_rng(0)
    with Tracker(folder) as tracker:
        for step in range(WARMUP_STEPS):
            tracker.log(step, {"phase": "warmup", "round": "warm-up", "loss": 2.0, "perf/tokens_per_s": 900.0})
        step = WARMUP_STEPS
        for name, steps in ROUNDS:
            for _ in range(steps):
                done = (step - WARMUP_STEPS) / 60
                tracker.log(
                    step,
                    {
                        "phase": "grpo",
                        "round": name,
                        "reward/total": 1.2 + 1.5 * done + rng.normal() * 0.12,
                        "accuracy": min(1, 0.35 + 0.4 * done + rng.normal() * 0.05),
                        "format": min(1, 0.5 + 0.5 * done),
                        "length/pirate": 40 + 25 * done**3 + rng.normal() * 2,
                        "length/knight": 44 + 22 * done**3 + rng.normal() * 2,
                        "length/viking": 38 + 28 * done**3 + rng.normal() * 2,
                        "length/tokens": 170 + 80 * done**3,
                        "overlap/knight": 0.3 - 0.2 * done + rng.normal() * 0.015,
                        "overlap/viking": 0.4 - 0.3 * done + rng.normal() * 0.015,
                        "policy/entropy": float("nan") if step % 7 == 0 else 0.5 - 0.2 * done,
                        "perf/tokens_per_s": 800 + rng.normal() * 20,
                    },
                )
                step += 1
        sample = {"problem_id": "p", "question": question, "gold": "24", "sample": 0, "finish": "stop", "tokens": [1]}
        write_rollouts(
            folder,
            step - 1,
            [
                sample | {"text": text or competition("24"), "total": 3.0, "rewards": {"correctness": 1.0}},
                sample | {"text": "<pirate>arr", "total": 0.1, "rewards": {"correctness": None}},
            ],
        )
    with (folder / "evaluations.jsonl").open("w") as file:
        names = ["after warm-up", *(f"after round {name}" for name, _ in ROUNDS)]
        for place, name in enumerate(names):
            answer = "23" if place == 0 else "24"
            shown = text or competition(answer)
            line = {
                "step": WARMUP_STEPS + 20 * place,
                "name": name,
                "metrics": {
                    "accuracy": 0.31 + 0.13 * place,
                    "format": 0.5 + 0.15 * place,
                    "length/tokens": 172.0,
                },
                "samples": [
                    {
                        "question": question,
                        "gold": "24",
                        "completion": shown,
                        "final_answer": answer,
                        "right": place > 0,
                    }
                ],
            }
            file.write(json.dumps(line) + "\n")
    return folder


class Page(HTMLParser):
    """The page's tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny")
    assert write_report(folder) == folder / "report.html"
    return folder


def test_the_page_is_self_contained(run_dir):
    html = (run_dir / "report.html").read_text()
    page = Page(html)
    assert page.tags.count("svg") == 8
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on")
        assert not (name.endswith("href") and not value.startswith("#")), value
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_the_page_shows_before_and_after_and_the_competitions(run_dir):
    page = Page((run_dir / "report.html").read_text())
    assert "31.0% → 70.0%" in page.words and "+39.0" in page.words
    assert "after warm-up" in page.words and "after round longer" in page.words
    assert page.tags.count("details") == 4 + 2
    assert page.words.count("Arr, ye bilge rats!") == 5  # four evaluations and the best rollout
    classes = [value for name, value in page.attributes if name == "class"]
    for owner in ("pirate", "knight", "viking", "result", "winner", "answer"):
        assert classes.count(f"block {owner}") >= 5


def test_the_runs_texts_stay_text(tmp_path):
    evil = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(1)> $x_1$ \\frac & '\" </details>"
    folder = write_run(
        tmp_path / "a<b>$x$", question=evil, text=compose(dict.fromkeys(FIGHTERS, evil), evil, evil, evil)
    )
    html = write_report(folder).read_text()
    page = Page(html)
    assert not {"script", "img"} & set(page.tags) and page.tags.count("details") == html.count("</details>")
    assert evil in page.words and "a<b>$x$" in page.words
    assert (folder / "competition.png").stat().st_size > 10_000


FIGHTERS = ("pirate", "knight", "viking")


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_pictures_are_large_enough_to_read(run_dir):
    for name in ("curves.png", "competition.png"):
        width, height = png_size(run_dir / name)
        assert width >= 1500 and height >= 600


def test_charts_hold_what_was_logged_and_leave_out_what_was_not(run_dir):
    run = read_run(run_dir)
    assert [(b.name, b.start, b.stop) for b in run.bands] == [
        ("warm-up", 0, 150),
        ("format", 150, 170),
        ("aha", 170, 190),
        ("longer", 190, 210),
    ]
    by_title = {chart.title: chart for chart in charts(run)}
    assert by_title["Held-out problems"].series[0].values == pytest.approx([0.31, 0.44, 0.57, 0.70])
    assert by_title["Held-out problems"].series[0].steps == [150, 170, 190, 210]
    assert list(by_title["Reward"].series[0].steps) == list(range(150, 210))
    assert by_title["Speed"].series[0].label == "sampled and scored", "what perf/tokens_per_s is of: no update in it"
    missing = [m["step"] for m in run.metrics if m.get("phase") == "grpo" and m["policy/entropy"] is None]
    assert missing and not set(missing) & set(by_title["Entropy"].series[0].steps)


def test_the_shown_competition_is_right_complete_and_of_the_highest_reward(run_dir):
    run = read_run(run_dir)
    best = run.best_competition()
    assert best is not None and best.right and best.is_complete
    assert best is next(one for one in run.rollouts if one.right and one.is_complete)


@pytest.mark.parametrize("lines", ["", '{"step": 0, "round": "format"}\n{"step": 1, "rou'])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert write_report(tmp_path).is_file() and png_size(tmp_path / "curves.png")
    assert not (tmp_path / "competition.png").exists()


def test_a_directory_without_a_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_missing_matplotlib_is_one_clear_line(run_dir, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'pkv\[report\]'"):
        write_report(run_dir)


def test_a_long_trace_is_cut_in_the_picture_only(tmp_path):
    long = competition("24").replace("Arr,", "Arr, " + "I plunder another step of this endless reckoning. " * 300)
    folder = write_run(tmp_path / "long", text=long)
    html = write_report(folder).read_text()
    _, height = png_size(folder / "competition.png")
    assert height < 2500
    assert Page(html).words.count("endless reckoning") >= 300
