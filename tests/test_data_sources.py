"""data/sources.py: every shape of problem is read alike, and every mistake is one line that names its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pkv.config import UnavailableError, UserError
from pkv.data import open_source
from pkv.data.columns import last_box

OWN = [
    {"id": "a", "question": "How many?", "answer": "24", "level": 2},
    {"id": "b", "question": "Which day?", "answer": "Tuesday"},
]
GSM8K = [
    {
        "question": "Nat sold 48 clips in April and half as many in May. How many?",
        "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": "A pound of tea costs $1,080. How much?", "answer": "It is <<1080=1080>>1,080.\n#### 1,080"},
]
MATH = [
    {
        "problem": "Find $x$.",
        "solution": "First $\\boxed{1}$; no, $\\boxed{\\frac{1}{2}}$.",
        "level": "Level 3",
        "type": "Algebra",
    },
    {"problem": "Find $y$.", "solution": "Then $y = \\boxed{\\{1, 2\\}}$.", "level": "Level 1", "type": "Algebra"},
]
MATH_500 = [{"problem": "Find $z$.", "solution": "So $z = \\boxed{7}$.", "answer": "7", "unique_id": "test/1"}]
GOLDS = {
    "own": (OWN, ["24", "Tuesday"]),
    "gsm8k": (GSM8K, ["72", "1,080"]),
    "math": (MATH, ["\\frac{1}{2}", "\\{1, 2\\}"]),
    "math_500": (MATH_500, ["7"]),
}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", GOLDS)
def test_every_shape_gives_the_same_problems_from_every_kind_of_file(tmp_path: Path, shape: str, ending: str) -> None:
    rows, golds = GOLDS[shape]
    problems = open_source(str(write(tmp_path / f"set{ending}", rows)))
    assert [problem.answer for problem in problems] == golds
    assert [problem.question for problem in problems] == [row.get("question", row.get("problem")) for row in rows]
    same = open_source(str(write(tmp_path / "again.jsonl", rows)))
    assert [problem.id for problem in problems] == [problem.id for problem in same]
    assert len({problem.id for problem in problems}) == len(rows)


def test_what_else_a_row_says_is_kept(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path / "own.jsonl", OWN)))[0].extra == {"level": 2}
    worked = open_source(str(write(tmp_path / "gsm.jsonl", GSM8K)))[0].extra["solution"]
    assert worked == "She sold 48/2 = 24 clips in May.\nAltogether 48+24 = 72."
    assert open_source(str(write(tmp_path / "math.jsonl", MATH)))[0].extra["level"] == "Level 3"


def test_the_limit_takes_the_first_problems(tmp_path: Path) -> None:
    path = str(write(tmp_path / "own.jsonl", OWN))
    assert [problem.id for problem in open_source(path, 1)] == ["a"]
    with pytest.raises(UserError, match="at least 1"):
        open_source(path, 0)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_directory_of_the_hubs_shape_loads_through_datasets(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "gsm"
    home.mkdir()
    write(home / f"train{ending}", GSM8K)
    write(home / f"test{ending}", GSM8K[:1])
    assert [problem.answer for problem in open_source(str(home))] == ["72", "1,080"]
    assert [problem.answer for problem in open_source(f"{home}:test")] == ["72"]
    assert [problem.answer for problem in open_source(f"{home}:default:train", 1)] == ["72"]
    with pytest.raises(UserError, match="nosuch"):
        open_source(f"{home}:default:nosuch")


def test_a_hub_name_is_loaded_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("openai/gsm8k:main:test", "openai/gsm8k:main", "openai/gsm8k:test", "openai/gsm8k::mine", "o/g"):
        assert len(open_source(source, 1)) == 1
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", None, "test"),
        ("openai/gsm8k", None, "mine"),
        ("o/g", None, "train"),
    ]


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UnavailableError, match=r"openai/gsm8k: .*offline.*local file") as caught:
        open_source("openai/gsm8k")
    assert "\n" not in str(caught.value)


def test_the_generators_are_a_source() -> None:
    problems = open_source("arithmetic:heldout:seed=3,count=5")
    assert len(problems) == 5 and all(problem.answer for problem in problems)
    assert open_source("arithmetic:heldout:seed=3", 5) == problems
    assert len(open_source("arithmetic:train:count=9", 4)) == 4


GOOD = json.dumps(OWN[0])
MISTAKES = {
    "no_answer": (f'{GOOD}\n\n{{"id": "c", "question": "Q"}}\n', r"line 3: has no answer"),
    "first_without_answer": ('{"question": "Q"}\n', r"line 1: has no answer: expected the columns .*got question"),
    "empty_answer": (f'{GOOD}\n{{"question": "Q", "answer": " "}}\n', r"line 2: has no answer"),
    "null_answer": (f'{GOOD}\n{{"question": "Q", "answer": null}}\n', r"line 2: has no answer"),
    "list_answer": (f'{GOOD}\n{{"question": "Q", "answer": ["1"]}}\n', r"line 2: its answer must be text"),
    "broken": (f"{GOOD}\n{{'id': 1}}\n", r"line 2, column 2: broken JSON"),
    "cut_off": (f'{GOOD}\n{{"id": "c", "question": "Q', r"line 2, column \d+: broken JSON"),
    "deep": ("[" * 200_000, r"line 1: broken JSON"),
    "not_a_row": (f"{GOOD}\n[1]\n", r"line 2: expected an object"),
    "question": (f'{GOOD}\n{{"question": 5, "answer": "1"}}\n', r"line 2: its question must be text, got '5'"),
    "half_a_character": (
        f'{GOOD}\n{{"question": "How \\ud83d many?", "answer": "1"}}\n',
        r"line 2: its question has '.ud83d', half of a character",
    ),
    "no_question": (f'{GOOD}\n{{"answer": "1"}}\n', r"line 2: its question must be text, got nothing"),
    "duplicate": (f"{GOOD}\n{GOOD}\n", r"line 2: the id 'a' was used before, in line 1"),
    "bad_id": ('{"id": [1], "question": "Q", "answer": "1"}\n', r"line 1: its id must be"),
    "columns": ('{"prompt": "Q", "label": "1"}\n', r"line 1: expected the columns .*got prompt, label"),
    "no_mark": ('{"question": "Q", "answer": "1+1 = <<1+1=2>>2"}\n', r"line 1: .*####"),
    "empty_mark": ('{"question": "Q", "answer": "two\\n#### "}\n', r"line 1: its answer is empty"),
    "no_box": ('{"problem": "Q", "solution": "it is 2"}\n', r"line 1: .*boxed"),
    "empty": ("\n\n", r"holds no problems"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_is_one_line_with_file_and_line(tmp_path: Path, name: str) -> None:
    text, message = MISTAKES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_in_other_files_are_named_too(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "1"}
    for path, place in ((tmp_path / "a.json", "item 2"), (tmp_path / "a.parquet", "row 2")):
        write(path, [row, {"question": "Q2", "answer": None}])
        with pytest.raises(UserError, match=rf"{place}: has no answer"):
            open_source(str(path))
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (tmp_path / "b.json").write_text('{"question": "Q"}')
    (tmp_path / "b.jsonl").write_bytes(b'{"question": "\xff"}\n')
    for name, message in (("b.parquet", "Parquet"), ("b.json", "JSON list"), ("b.jsonl", r"line 1: not UTF-8")):
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", OWN)
    with pytest.raises(UserError, match=r"did you mean .*problems\.jsonl"):
        open_source(str(tmp_path / "problem.jsonl"))
    with pytest.raises(UserError, match="no directory"):
        open_source(str(tmp_path / "nowhere" / "problem.jsonl"))


@pytest.mark.parametrize(
    "source",
    [
        "",
        "gsm8k",
        "arithmetic",
        "arithmetic:test",
        "arithmetic:train:count=x",
        "arithmetic:train:n=1",
        "a/b/c",
        "a/b:c:d:e",
        "arithmetic:train:count=0",
    ],
)
def test_what_is_no_source_says_what_one_is(source: str) -> None:
    with pytest.raises(UserError, match=r"expected|at least"):
        open_source(source)


def test_the_same_question_twice_gets_two_ids_that_do_not_change(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"question": "Q", "answer": 1}, {"question": "Q", "answer": 0.5}]))
    first, second = open_source(path)
    assert first.id != second.id and (first.answer, second.answer) == ("1", "0.5")
    assert [problem.id for problem in open_source(path)] == [first.id, second.id]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 4$", "4"),
        ("\\boxed{5", None),
        ("\\{ \\boxed{\\{6\\}}", "\\{6\\}"),
        ("none", None),
    ],
)
def test_the_last_box_is_the_gold_answer(text: str, box: str | None) -> None:
    assert last_box(text) == box
