"""SPEC's table of rewards by hand-worked cases, and what holds for all of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkv.competition.construct import compose
from pkv.competition.parser import parse, split_tokens
from pkv.config import Config, RewardConfig, RoundConfig, UserError
from pkv.mathcheck import VerifyError
from pkv.records import OWNERS, REWARD_OWNERS, Problem, Scorecard
from pkv.rewards import (
    DEFAULT_WEIGHTS,
    FAMILIES,
    RULES,
    Scorer,
    ScoringPool,
    budget,
    load_user_rewards,
    resolve_weights,
    score_lines,
)

PROBLEM = Problem("p1", "5 hives make 20 candles. How many candles do 6 hives make?", "24")
PIRATE = (
    "Arr, mateys! On me map stand 5 and 20 and 6. I plunder the share of one: 20 / 5 = 5. Arr, no, that be wrong! "
    "20 / 5 = 4. I plunder the share of all: 6 * 4 = 24. So the answer be 24, and the treasure is mine."
)
KNIGHT = (
    "By my honour! With a noble heart I seek how many times more hives there are: 6 / 5 = 1.2. Then that many times "
    "the candles: 1.2 * 20 = 24. Thus the answer is 24."
)
VIKING = (
    "By Odin's beard! My axe hews out one hive more than five, and its candles beside the others: 20 + 5 = 25. The "
    "saga ends: the answer is 25."
)
RESULT = "Beep. pirate 24, knight 24, viking 25. The viking cannot count. I check the pirate: 6 * 4 = 24. It holds."
ANSWER = "Six hives make 24 candles.\nAnswer: 24"


def build(pirate=PIRATE, knight=KNIGHT, viking=VIKING, result=RESULT, winner="pirate", answer=ANSWER) -> str:
    return compose({"pirate": pirate, "knight": knight, "viking": viking}, result, winner, answer)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(DEFAULT_WEIGHTS, 64) as scorer:
        yield scorer


def value(scorer: Scorer, text: str, name: str, problem: Problem = PROBLEM) -> float | None:
    card = scorer.score(problem, parse(text))
    assert card.rewards[name].status != "unscored", card.rewards[name].detail
    return card.rewards[name].value


@pytest.mark.parametrize("forced, structure, layout", [(0, 1.0, 1.0), (1, 0.8, 0.0), (2, 0.6, 0.0), (3, 0.3, 0.0)])
def test_a_tag_that_the_engine_had_to_set_counts_as_missing(scorer, forced, structure, layout):
    """A fighter that never stops lets its budget close its block: that is not the policy's format."""
    text = build()
    offsets = split_tokens(text)
    set_by_engine = np.zeros(len(offsets) - 1, bool)
    for tag in ("</pirate>", "</knight>", "</viking>")[:forced]:
        start = text.index(tag)
        set_by_engine |= (offsets[:-1] >= start) & (offsets[:-1] < start + len(tag))
    trace = parse(text, offsets, forced=set_by_engine)
    assert [error.code for error in trace.errors] == ["forced"] * forced
    card = scorer.score(PROBLEM, trace)
    assert card.rewards["tag_structure"].value == structure
    assert card.rewards["competition_format"].value == layout


def test_a_good_competition_earns_what_its_parts_earn(scorer):
    card = scorer.score(PROBLEM, parse(build()))
    assert card.unscored == ()
    earned = {name: reward.value for name, reward in card.rewards.items()}
    assert earned["tag_structure"] == earned["competition_format"] == earned["winner"] == earned["correctness"] == 1.0
    assert earned["reflection_pirate"] == pytest.approx(0.2 + 0.4)
    assert earned["reflection_knight"] <= 0.2 and earned["reflection_viking"] <= 0.2
    assert earned["originality_knight"] == earned["originality_viking"] == 0.5
    assert [earned[f"fighter_correctness_{name}"] for name in ("pirate", "knight", "viking")] == [1.0, 1.0, 0.0]
    assert earned["judge_accuracy"] == 1.0 and earned["judge_reasoning"] == pytest.approx(1.0)
    assert card.total == pytest.approx(sum(scorer.weights[n] * v for n, v in earned.items() if v is not None))
    assert card.final_answer == "24" and card.facts["extraction"] == "marker"
    assert card.facts["winner"] == "pirate" and card.facts["answer/viking"] == "25"
    judged = {key: card.facts[f"judge/{key}"] for key in ("any_right", "majority_right", "right", "disagree")}
    assert judged == dict.fromkeys(judged, True) and card.facts["judge/gain"] == pytest.approx(1 / 3)
    assert set(card.facts) >= {"overlap/knight_pirate", "overlap/viking_pirate", "overlap/viking_knight"}
    assert card.facts["length/pirate"] == parse(build()).blocks["pirate"].tokens.size > 30


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text, 1.0),
        (lambda text: text.replace("</knight>", ""), 0.8),  # 11 placed, capped; 1 missing
        (lambda text: text.replace("<knight>", "").replace("</knight>", ""), 0.6),  # 10 placed, 2 missing
        (lambda text: text.replace("<knight>", "<knight><knight>"), 0.9),  # 12 placed, 1 duplicate
        (lambda text: text.replace("<knight>", "<knight>" * 4), 0.7),
        (lambda text: text.replace("<knight>", "<knight>" * 40), 0.0),
        (lambda text: text.replace("</knight>", "").replace("<viking>", "<viking><viking>"), 0.7),
        (lambda text: text.replace("<knight>", "<knight bold>"), 0.8),
        (lambda text: text.replace("<pirate>", "<Pirate>").replace("</viking>", "&lt;/viking&gt;"), 0.6),
        (lambda text: "", 0.0),
        (lambda text: "<competition>", 0.0),
        (lambda text: text.partition("<viking>")[0], 0.0),  # 5 placed, 7 missing
        (lambda text: text.partition("</winner>")[0], 0.3),  # 9 placed, 3 missing
    ],
)
def test_tag_structure_by_hand(scorer, damage, expected):
    assert value(scorer, damage(build()), "tag_structure") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text, 1.0),
        (lambda text: text.replace("<knight>\n", "<knight>  "), 0.5),
        (lambda text: text.replace("\n", " "), 0.5),
        (lambda text: "Here it comes.\n" + text, 0.5),
        (lambda text: text.replace("</pirate>", ""), 0.0),
        (lambda text: text.replace("<pirate>", "<pirate><pirate>"), 0.0),
        (lambda text: text.replace("<pirate>", "<pirate style='x'>"), 0.0),
        (lambda text: text.replace("knight>", "k>").replace("viking>", "knight>").replace("k>", "viking>", 4), 0.0),
        (lambda text: f"```\n{text}\n```", 0.0),
        (lambda text: "", 0.0),
    ],
)
def test_competition_format_by_hand(scorer, damage, expected):
    assert value(scorer, damage(build()), "competition_format") == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("knight", 1.0),
        (" viking\n", 1.0),
        ("Pirate", 1.0),
        ("the knight", 0.5),
        ("knight, by a nose", 0.5),
        ("pirate | knight | viking", 0.0),
        ("pirate and knight", 0.0),
        ("nobody", 0.0),
        ("", 0.0),
        ("piratess", 0.0),
    ],
)
def test_winner_by_hand(scorer, said, expected):
    assert value(scorer, build(winner=said), "winner") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Answer: 24", 1.0),
        ("The winner, the pirate, settled it with their answer of 24 hives needed to make 96 candles.", 1.0),
        (r"\boxed{24}", 1.0),
        (r"First \boxed{23}, no: \boxed{24}", 1.0),
        ("Answer: 25", 0.0),
        ("Answer: 41 = 24", 0.0),
        ("Answer: 23, 24 or 25", 0.0),
        ("", 0.0),
        ("Answer: 24 </winner>", -1.0),
        ("Answer: 24 <Pirate>", -1.0),
        ("Answer: 24 &lt;result&gt;", -1.0),
    ],
)
def test_correctness_by_hand(scorer, answer, expected):
    assert value(scorer, build(answer=answer), "correctness") == expected


def test_a_missing_block_earns_nothing_and_a_missing_answer_is_wrong(scorer):
    card = scorer.score(PROBLEM, parse("The answer is 24."))
    earned = {name: reward.value for name, reward in card.rewards.items()}
    assert all(earned[f"{family}_{name}"] == 0 for family in ("length", "reflection") for name in ("pirate", "knight"))
    assert earned["originality_knight"] == earned["originality_viking"] == -0.5
    assert earned["correctness"] == 0 and card.facts["length/pirate"] == 0


def test_length_rises_to_the_optimum_and_falls_beyond():
    text = parse(build())
    tokens = text.blocks["knight"].tokens.size
    for optimum, expected in ((tokens * 4, 0.25), (tokens * 2, 0.5), (tokens, 1.0), (tokens * 2 / 3, 0.5), (10, 0.0)):
        with Scorer({}, optimum) as scorer:
            assert scorer.score(PROBLEM, text).rewards["length_knight"].value == pytest.approx(expected, abs=0.02)


def test_copying_is_graded_between_its_ends(scorer):
    words = re.findall(
        r"\w+", "so we take away what was lent and then share out evenly among everybody present before supper"
    )
    others = re.findall(
        r"\w+", "whoever counts slowly should first draw small boxes around pairs because that keeps errors apart"
    )
    found = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        cut = int(share * len(words))
        knight = " ".join(words[:cut] + others[cut:]) + ". The answer is 24 candles."
        pirate = " ".join(words) + ". The answer is 24 candles."
        found.append(value(scorer, build(pirate=pirate, knight=knight), "originality_knight"))
    assert found[0] == 0.5 and found[-1] == -0.5
    assert found == sorted(found, reverse=True) and len(set(found)) > 2


def test_the_viking_may_copy_neither(scorer):
    assert value(scorer, build(viking=PIRATE), "originality_viking") == -0.5
    assert value(scorer, build(viking=KNIGHT), "originality_viking") == -0.5
    assert value(scorer, build(knight=PIRATE, viking=VIKING), "originality_viking") == 0.5


def originality_of(scorer, problem, pirate, knight) -> float | None:
    return scorer.score(problem, parse(build(pirate=pirate, knight=knight))).rewards["originality_knight"].value


def test_a_step_that_the_question_asks_for_is_no_copy_beside_own_ones(scorer):
    apples = Problem("a", "Tom has 17 apples and buys 25 more. How many apples has he now?", "42")
    pirate = "Arr, I put the old loot and the new in one chest: 17 + 25 = 42 apples. The answer is 42."
    knight = (
        "By my honour, I round the purchase up and take 5 back: 17 + 30 = 47, 47 - 5 = 42. I verify: 17 + 25 = 42. "
        "The answer is 42."
    )
    assert originality_of(scorer, apples, pirate, knight) > 0.3
    assert originality_of(scorer, apples, pirate, pirate.replace("Arr, I", "By my honour, I")) == -0.5


def test_work_in_number_words_and_in_other_languages_is_an_attempt(scorer):
    words = "By my honour, I divide twenty by five and get four. Then six times four is twenty-four. The answer is 24."
    assert originality_of(scorer, PROBLEM, "Arr. " + VIKING, words) == 0.5
    hives = Problem(
        "z",
        "5\u4e2a\u8702\u5de2\u4ea720\u652f\u8721\u70db\uff0c6\u4e2a\u8702\u5de2\u4ea7\u591a\u5c11\u652f\uff1f",
        "24",
    )
    first = "\u6bcf\u4e2a\u8702\u5de2\u4ea7 20 / 5 = 4 \u652f\u3002\u516d\u4e2a\u4ea7 6 * 4 = 24 \u652f\u3002Answer: 24"
    second = (
        "\u6211\u7528\u6bd4\u4f8b\u6765\u7b97\uff0c6 / 5 = 1.2\uff0c"
        "\u7136\u540e 1.2 * 20 = 24\uff0c\u9a8c\u8bc1\u65e0\u8bef\u3002Answer: 24"
    )
    assert originality_of(scorer, hives, first, second) == 0.5
    assert originality_of(scorer, hives, first, first) == -0.5
    sides = Problem("f", "Combien de c\u00f4t\u00e9s poss\u00e8de un hexagone ?", "6")
    first = (
        "Arr, hexa veut dire six en grec, donc la figure poss\u00e8de six c\u00f4t\u00e9s, parole de pirate. Answer: 6"
    )
    second = "Par mon honneur, je dessine la figure et je compte chaque bord un par un : il y en a six. Answer: 6"
    assert originality_of(scorer, sides, first, second) > 0


def test_a_judge_that_repeats_a_false_step_has_checked_nothing(scorer):
    slip = PIRATE.replace("6 * 4 = 24", "6 * 4 = 26").replace("be 24", "be 26")
    ruling = "Beep. pirate 26, knight 24, viking 25. I check the pirate: 6 * 4 = 26 and 20 / 5 = 4. It holds."
    assert value(scorer, build(pirate=slip, result=ruling), "judge_reasoning") == pytest.approx(0.6)
    ruling = "Beep. pirate 26, knight 24, viking 25. The pirate is wrong in 6 * 4 = 26, but 20 / 5 = 4 holds."
    assert value(scorer, build(pirate=slip, result=ruling), "judge_reasoning") == pytest.approx(0.8)
    ruling = "Beep. pirate 26, knight 24, viking 25. There is no doubt: 6 * 4 = 26, and I check that 20 / 5 = 4."
    assert value(scorer, build(pirate=slip, result=ruling), "judge_reasoning") == pytest.approx(0.6)
    unseen = "Beep. pirate 26, knight 24, viking 25. I check the pirate, it seems: 20 / 5 = 4. It holds."
    assert value(scorer, build(pirate=slip, result=unseen), "judge_reasoning") == pytest.approx(0.6)
    listed = "pirate knight viking 24, 6 * 4 = 24"
    assert value(scorer, build(result=listed), "judge_reasoning") == pytest.approx(0.4)
    turned = RESULT.replace("6 * 4 = 24", "24 = 6 * 4")
    assert value(scorer, build(result=turned), "judge_reasoning") == pytest.approx(1.0)


def test_judge_accuracy_counts_only_where_the_fighters_disagree(scorer):
    assert value(scorer, build(winner="viking"), "judge_accuracy") == 0
    assert value(scorer, build(winner="knight"), "judge_accuracy") == 1
    assert value(scorer, build(winner="nobody"), "judge_accuracy") == 0
    agreed = scorer.score(PROBLEM, parse(build(viking=KNIGHT))).rewards["judge_accuracy"]
    assert agreed.value is None and agreed.status == "absent"


CORRECTIONS = [
    ("20 / 5 = 5. No, that is wrong: 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.4),
    (r"$\frac{20}{5} = 5$. Wait, $\frac{20}{5} = 4$. $6 \times 4 = 24$. The answer is 24.", 0.4),
    ("20 / 5 = 5, no wait, 4. 6 * 4 = 24. The answer is 24.", 0.4),
    ("x = 7. Hold on, let me recheck. x = 4. Then 6 * x = 6 * 4 = 24. The answer is 24.", 0.2),
    ("The answer is 20. Wait, I missed one hive. The answer is 24.", 0.4),
    ("20 / 5 = 4. No, that is wrong: 20 / 5 = 5. 6 * 5 = 30. The answer is 30.", 0.1),  # right to wrong
    ("20 / 5 = 4. Wait, aha! 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.0),  # nothing changed
    ("20 / 5 = 4. 6 * 4 = 24. Wait. Hmm. No, that is wrong. Aha! The answer is 24.", 0.0),
    ("20 / 5 = 5. 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.0),  # no cue
    ("7 + 7 = 15. No, that is wrong: 7 + 7 = 14. 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.0),  # used nowhere
    ("20 / 5 = 5. No: 20 / 5 = 4. Wait: 20 / 5 = 5. Oops: 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.4),
    ("20 / 5 = 5. Wait: 20 / 5 = 4. 6 * 4 = 25. Wait: 6 * 4 = 24. The answer is 24.", 0.4),  # the same cue again
    ("20 / 5 = 5. Wait: 20 / 5 = 4. 6 * 4 = 25. Oops: 6 * 4 = 24. The answer is 24.", 0.8),
    (
        "5 + 5 = 11. Wait: 5 + 5 = 10. 10 + 6 = 17. Oops: 10 + 6 = 16. 16 + 6 = 23. Scratch that: 16 + 6 = 22. "
        "22 + 2 = 24. The answer is 24.",
        0.8,
    ),
    ("I get 5 = 20 / 5. Nay, 4 = 20 / 5. And 24 = 6 * 4. The answer is 24.", 0.4),
    ("20 / 5 = 5. Hang on. 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.4),
    ("n = 5. Wait, n = 4. So 6 * n = 24. The answer is 24.", 0.2),
    # about nothing that was asked
    ("1 + 1 = 3. No: 1 + 1 = 2. 2 + 2 = 5. Oops: 2 + 2 = 4. 20 / 5 = 4. 6 * 4 = 24. The answer is 24.", 0.0),
]


@pytest.mark.parametrize(("text", "expected"), CORRECTIONS)
def test_corrections_by_hand(scorer, text, expected):
    assert value(scorer, build(pirate=text), "reflection_pirate") == pytest.approx(expected)


def test_every_reward_has_a_known_owner_and_stays_in_its_range(scorer):
    assert {rule.owner for rule in RULES.values()} <= set(REWARD_OWNERS) >= set(OWNERS)
    assert {name for members in FAMILIES.values() for name in members} == set(RULES)
    assert RULES["correctness"].owner == "answer" and RULES["tag_structure"].owner == "tags"
    assert RULES["originality_viking"].owner == "viking"
    assert {RULES[name].owner for name in ("winner", "judge_accuracy", "judge_reasoning")} == {"judge"}


FRAGMENTS = [
    "20 / 5 = 4. ",
    "no, ",
    "wait 5 ",
    "</knight>",
    "<pirate>",
    "<winner>",
    "\\boxed{",
    "}",
    "\u200b",
    "((",
    "=",
    "^",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*FRAGMENTS, "abc "]) | st.text(max_size=6), max_size=30), st.integers(0, 600))
def test_whatever_the_text_every_reward_is_scored_or_absent_and_in_range(parts, at):
    text = build()
    text = text[:at] + "".join(parts) + text[at + 10 :]
    with Scorer(DEFAULT_WEIGHTS, 64) as scorer:
        card = scorer.score(PROBLEM, parse(text))
    assert set(card.rewards) == set(RULES)
    for name, reward in card.rewards.items():
        assert reward.status != "unscored" or name.split("_")[0] in ("correctness", "fighter", "judge"), reward.detail
        if reward.value is not None:
            assert RULES[name].low <= reward.value <= RULES[name].high + 1e-9


@pytest.mark.parametrize(
    "unit",
    [
        "20 / ",
        "((",
        "= 4 ",
        "no, wait ",
        "answer is 5. ",
        "no, 1+1=2. wait 1+1=3. ",
        "((((((((9^12)^12)^12)^12)^12)^12)^12)^12) = 5. ",
        "7+8=777. no, 7+8=888. 1+1=2 1+2=3 1+3=4 ",
        "\\frac{",
        "<pirate>",
        "1" * 50,
        " \n",
    ],
)
def test_a_hundred_thousand_characters_of_anything_can_be_scored(scorer, unit):
    noise = unit * (100_000 // len(unit))
    began = time.process_time()
    scorer.score(PROBLEM, parse(build(pirate=noise, knight=noise)))
    assert time.process_time() - began < 60  # what is quadratic takes many minutes


def test_a_family_sets_its_members_and_an_own_name_overrides():
    weights = resolve_weights({"length_knight": 0.0, "length": 2.0, "correctness": 3.0})
    assert (weights["length_pirate"], weights["length_knight"], weights["correctness"]) == (2.0, 0.0, 3.0)
    assert weights["winner"] == 0.0 and set(weights) == set(RULES)
    with pytest.raises(UserError, match="'reflexion'; did you mean 'reflection'"):
        resolve_weights({"reflexion": 1.0})
    with pytest.raises(UserError, match="finite"):
        resolve_weights({"length": float("nan")})


def test_the_budget_warns_where_being_right_does_not_outweigh_the_rest():
    assert "warning" not in budget(DEFAULT_WEIGHTS)
    assert "a right answer is worth 12, everything else together 11" in budget(DEFAULT_WEIGHTS)
    assert "warning" in budget({**DEFAULT_WEIGHTS, "correctness": 10.0})


USER_FILE = """
import time

def brief(problem, trace):
    return 1.0 if len(trace.text) < 10_000 else None

def broken(problem, trace):
    raise RuntimeError("no")

def endless(problem, trace):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def nonsense(problem, trace):
    return float("nan")

def leaving(problem, trace):
    raise SystemExit(3)

def rewards():
    found = {"brief": ("trace", brief)}
    found |= {"broken": ("answer", broken), "endless": ("trace", endless)}
    return found | {"nan": ("tags", nonsense), "leaving": ("trace", leaving)}
"""


def check_user_card(card: Scorecard) -> None:
    assert card.rewards["brief"].value == 1.0 and card.rewards["brief"].owner == "trace"
    assert set(card.unscored) == {"broken", "endless", "nan", "leaving"}
    assert "RuntimeError: no" in card.rewards["broken"].detail and "timeout" in card.rewards["endless"].detail
    assert card.total == 2.0  # what is unscored adds nothing, whatever its weight


def test_a_failing_reward_is_unscored_and_never_zero(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    config = RewardConfig(user_files=(str(path),), timeout_s=0.2)
    with Scorer({"brief": 2.0, "broken": 5.0, "endless": 5.0}, 64, config) as scorer:
        check_user_card(scorer.score(PROBLEM, parse(build())))


@pytest.mark.slow
def test_a_scoring_process_that_dies_is_one_clear_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef rewards():\n    return {'fatal': ('trace', lambda p, t: os._exit(3))}\n")
    with (
        ScoringPool({}, 64, RewardConfig(workers=1, user_files=(str(path),))) as pool,
        pytest.raises(UserError, match="a scoring process died"),
    ):
        pool.submit(PROBLEM, build()).result(60)


def test_a_reward_that_is_late_off_the_main_thread_is_unscored_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import time\ndef rewards():\n    return {'late': ('trace', lambda p, t: time.sleep(0.1) or 1.0)}\n"
    )
    cards = []
    with Scorer({}, 64, RewardConfig(user_files=(str(path),), timeout_s=0.05)) as scorer:
        thread = threading.Thread(target=lambda: cards.append(scorer.score(PROBLEM, parse(build()))))
        thread.start()
        thread.join()
    assert cards[0].unscored == ("late",)


def test_an_answer_that_cannot_be_checked_is_unscored(scorer, monkeypatch):
    def fail(answer, gold, pool=None):
        raise VerifyError("timeout", "too slow")

    monkeypatch.setattr("pkv.rewards.scoring.is_right", fail)
    card = scorer.score(PROBLEM, parse(build()))
    assert {"correctness", "fighter_correctness_pirate", "judge_accuracy"} <= set(card.unscored)
    assert card.facts["right/pirate"] is None and card.facts["judge/right"] is None
    assert card.rewards["tag_structure"].value == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def rewards(): return []", "must return"),
        ("def rewards(): return {'winner': ('trace', print)}", "pkv's own"),
        ("def rewards(): return {'mine': print}", "expected .owner, function."),
        ("def rewards(): return {'mine': ('pirat', print)}", "did you mean 'pirate'"),
        ("raise OSError('gone')", "OSError: gone"),
        ("x = (", "SyntaxError"),
    ],
)
def test_a_bad_user_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_user_rewards(path)
    assert "mine.py" in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_user_rewards(tmp_path / "none.py")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_pool_scores_like_the_scorer(scorer, workers):
    texts = [build(), build(winner="viking"), "", "<pirate>"]
    with ScoringPool(DEFAULT_WEIGHTS, 64, RewardConfig(workers=workers)) as pool:
        futures = [pool.submit(PROBLEM, text, None, index == 3) for index, text in enumerate(texts)]
        found = [future.result(60) for future in futures]
    assert [card for _, card in found] == [scorer.score(PROBLEM, parse(text)) for text in texts]
    assert [trace.truncated for trace, _ in found] == [False, False, False, True]


KILLED = """
import multiprocessing, os, signal
from pkv.config import RewardConfig
from pkv.records import Problem
from pkv.rewards import DEFAULT_WEIGHTS, ScoringPool

if __name__ == "__main__":
    pool = ScoringPool(DEFAULT_WEIGHTS, 64, RewardConfig(workers=2))
    for future in [pool.submit(Problem("p", "1 + 1", "2"), "") for _ in range(4)]:
        future.result()
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_scores_leaves_when_who_asked_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    said = subprocess.run([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True, timeout=120)
    pids = said.stdout.split()
    assert pids and said.returncode == -9
    until = time.monotonic() + 30
    while any(works(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_who_scores_leaves_it_to_who_asked_when_all_are_told_to_stop(tmp_path):
    """As `timeout` and schedulers tell them; the step that is to be ended still needs its scores."""
    with ScoringPool(DEFAULT_WEIGHTS, 64, RewardConfig(workers=1)) as pool:
        roots = (
            Problem("p2", "What is the sine of 45 degrees?", "\\frac{\\sqrt{2}}{2}"),
            build(answer="\\boxed{1/\\sqrt{2}}"),
        )
        first = pool.submit(*roots).result(60)
        assert first[1].rewards["correctness"].value == 1.0
        (scoring,) = multiprocessing.active_children()
        checking = children_of(scoring.pid)
        assert checking
        for pid in (scoring.pid, *checking):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        found = pool.submit(*roots).result(60)
        assert found[1] == first[1] and children_of(scoring.pid) == checking


def children_of(parent: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone by now
            found += [int(file.parent.name)] * (file.read_text().rpartition(")")[2].split()[1] == str(parent))
    return found


def works(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


LINE = {"id": "a", "question": PROBLEM.question, "answer": "24", "completion": build()}


def test_a_scored_file_has_the_contracts_fields(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", LINE, LINE | {"id": 7, "answer": 24, "completion": "24"})
    first, second = score_lines(path)
    assert set(first) == {"id", "rewards", "total", "errors", "blocks", "final_answer"}
    assert json.loads(json.dumps(first)) == first and set(first["rewards"]) == set(RULES)
    start, stop = first["blocks"]["pirate"]
    assert LINE["completion"][start:stop].strip() == PIRATE
    assert first["final_answer"] == "24" and first["errors"] == [] and first["rewards"]["correctness"] == 1.0
    assert second["id"] == 7 and "missing" in second["errors"] and first["total"] > second["total"] + 12


def test_a_rounds_weights_and_length_are_used(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", LINE)
    rounds = (RoundConfig(name="one", weights={"winner": 3.0}), RoundConfig(name="two", weights={"correctness": 5.0}))
    totals = [next(score_lines(path, Config(rounds=rounds), name))["total"] for name in ("one", "two", None)]
    assert totals == [3.0, 5.0, 5.0]
    with pytest.raises(UserError, match="no such round; there are: one, two"):
        next(score_lines(path, Config(rounds=rounds), "three"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not a JSON object"),
        (b"[1]", "line 2: expected an object"),
        (b"\xff\xfe", "line 2: not a JSON object in UTF-8"),
        (b'{"id": "b", "question": "q", "answer": "1"}', "line 2: 'completion' is missing"),
        (b'{"id": "b", "question": "q", "answer": "", "completion": ""}', "line 2: 'answer' is empty"),
        (b'{"id": "b", "question": 5, "answer": "1", "completion": ""}', "line 2: 'question': expected text"),
        (b'{"id": true, "question": "q", "answer": "1", "completion": ""}', "line 2: 'id': expected text"),
        (b'{"id": NaN, "question": "q", "answer": "1", "completion": ""}', "line 2: not a JSON object"),
        (b"[" * 100_000, "line 2: not a JSON object"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(score_lines(path))
    with pytest.raises(UserError, match="No such file"):
        list(score_lines(tmp_path / "none.jsonl"))


def test_scoring_imports_nothing_heavy():
    code = "import sys, pkv.rewards; print({'jax', 'flax', 'transformers', 'sympy', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
