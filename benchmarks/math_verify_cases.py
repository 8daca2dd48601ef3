"""Holds mathcheck against math-verify's own test cases: `python benchmarks/math_verify_cases.py SDIST [--json]`.

SDIST is math-verify's source distribution, packed or unpacked. Its tests are read as syntax trees, never imported. A
disagreement is named by file and line, and docs/math_verify.md says why it is one; one that is missing there, or one
there that is none any more, makes the exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pkv.mathcheck import VerifyError, VerifyPool, extract_answer, is_right

EXPLANATIONS = Path(__file__).resolve().parent.parent / "docs" / "math_verify.md"
VERDICTS = ("expected", "result")  # the columns' names for what is right
# math-verify's options as pkv uses them. A looser comparison that finds two texts equal says nothing about pkv's, nor
# does a stricter one that finds them different.
OPTIONS = {"precision": 6, "strict": True, "allow_set_relation_comp": True}
LOOSER_IF_MORE = ("allow_set_relation_comp",)
CONNECTED = re.compile(r"\b(?:and|or)\b|[,;]")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$((?:\\\$|[^$])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One published case: whether `pred` is a right answer where `gold` is the right one."""

    file: str
    line: int
    gold: str
    pred: str
    expected: bool


@dataclass(frozen=True)
class Outcome:
    """What pkv makes of a case: the answers that it compared and how it found the prediction's.

    got: right or wrong; None where the comparison came to no result.
    reason: the heading in docs/math_verify.md that explains a disagreement; "" where none does.
    """

    file: str
    line: int
    gold: str
    answer: str | None
    code: str
    expected: bool
    got: bool | None
    reason: str

    @property
    def agrees(self) -> bool:
        """Whether pkv and math-verify's authors say the same."""
        return self.got == self.expected


def main() -> int:
    """Read the cases, compare them all, print what came out."""
    parser = argparse.ArgumentParser(description="Holds mathcheck against math-verify's own test cases.")
    parser.add_argument("sdist", type=Path, help="math-verify's source distribution: the .tar.gz or its directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    cases: list[Case] = []
    passed_over: list[str] = []
    try:
        for name, source in read_tests(arguments.sdist):
            found, others = read_cases(name, source)
            cases += found
            passed_over += others
    except (OSError, tarfile.TarError) as error:
        parser.error(f"cannot read {arguments.sdist}: {error}")
    if not cases:
        parser.error(f"{arguments.sdist} holds no cases: expected math-verify's source distribution")
    reasons = read_reasons(EXPLANATIONS.read_text(encoding="utf-8"))
    with VerifyPool(timeout_s=20.0) as pool:
        outcomes = [compare(case, pool, reasons.get((case.file, case.line), "")) for case in cases]
    summary = summarise(outcomes, passed_over)
    print(json.dumps(summary) if arguments.json else describe(summary, outcomes))
    return int(any(outcome.agrees == bool(outcome.reason) for outcome in outcomes))


def read_tests(sdist: Path) -> Iterator[tuple[str, str]]:
    """(name, source) of every test file in a source distribution, sorted by name."""
    if sdist.is_dir():
        for path in sorted(sdist.glob("tests/test_*.py")):
            yield path.name, path.read_text(encoding="utf-8")
        return
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            file = archive.extractfile(member) if path.match("tests/test_*.py") else None
            if file:
                yield path.name, file.read().decode("utf-8")


def read_cases(name: str, source: str) -> tuple[list[Case], list[str]]:
    """The cases of a test file, and a line on everything that was passed over."""
    cases: list[Case] = []
    passed_over: list[str] = []
    for test in ast.parse(source).body:
        if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test"):
            continue
        columns, rows = find_table(test)
        if not rows:
            passed_over.append(f"{name}:{test.lineno} {test.name}: no table of gold answers, predictions and verdicts")
        for row in rows:
            try:
                values = dict(zip(columns, ast.literal_eval(row), strict=True))
            except ValueError:
                passed_over.append(f"{name}:{row.lineno} {test.name}: computed, not a literal")
                continue
            expected = bool(next(values[column] for column in VERDICTS if column in values))
            foreign = foreign_option(find_options(test) | values, expected)
            if foreign:
                passed_over.append(f"{name}:{row.lineno} {test.name}: tests {foreign}, which pkv does not use")
            else:
                cases.append(Case(name, row.lineno, values["gold"], values["pred"], expected))
    return cases, passed_over


def find_table(test: ast.FunctionDef) -> tuple[list[str], list[ast.expr]]:
    """(columns, rows) that a test is run with; no rows where they are no gold answers, predictions and verdicts."""
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            names, rows = decorator.args[:2]
            columns = [column.strip() for column in ast.literal_eval(names).split(",")]
            options = set(columns) - {"gold", "pred", *VERDICTS}
            if len(columns) - len(options) == 3 and options <= set(OPTIONS) and isinstance(rows, ast.List):
                return columns, rows.elts
    return [], []


def find_options(test: ast.FunctionDef) -> dict[str, object]:
    """math-verify's options that a test's body sets to a constant."""
    return {
        keyword.arg: keyword.value.value
        for call in ast.walk(ast.Module(test.body, []))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in OPTIONS and isinstance(keyword.value, ast.Constant)
    }


def foreign_option(options: dict[str, object], expected: bool) -> str:
    """The option that keeps a case from saying anything about pkv's comparison, as `name=value`; else ""."""
    for name, own in OPTIONS.items():
        value = options.get(name, own)
        if value != own:
            assert isinstance(value, int)
            looser = (value > own) == (name in LOOSER_IF_MORE)
            if looser == expected:
                return f"{name}={value}"
    return ""


def read_gold(text: str) -> str:
    """The answer in a gold text as math-verify takes it: its last box or formula, or several that are connected."""
    boxes = list(find_boxes(text))
    pieces = boxes or [(*match.span(), match[match.lastindex or 0]) for match in FORMULA.finditer(text)]
    if not pieces:
        return text
    chosen = [pieces[-1]]
    for piece in reversed(pieces[:-1]):
        between = text[piece[1] : chosen[0][0]]
        connected = CONNECTED.search(between) if boxes else CONNECTED.fullmatch(between.strip())
        if not (connected and len(between) < 70) and not (boxes and len(between) < 10):
            break
        chosen.insert(0, piece)
    return ", ".join(dict.fromkeys(inside.strip() for _, _, inside in chosen))


def find_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, inside) of the boxes that are closed again and stand in no other, in order."""
    stop = 0
    for opening in re.finditer(r"\\boxed\s?\{", text):
        if opening.start() < stop:
            continue
        depth = 1
        for brace in re.finditer(r"[{}]", text[opening.end() :]):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                stop = opening.end() + brace.end()
                yield opening.start(), stop, text[opening.end() : stop - 1]
                break


def compare(case: Case, pool: VerifyPool, reason: str) -> Outcome:
    """What pkv says about a case."""
    gold, found = read_gold(case.gold), extract_answer(case.pred)
    got: bool | None = False
    if found.value is not None:
        try:
            got = is_right(found.value, gold, pool)
        except VerifyError:
            got = None
    return Outcome(case.file, case.line, gold, found.value, found.code, case.expected, got, reason)


def read_reasons(document: str) -> dict[tuple[str, int], str]:
    """(file, line) to the heading under which the document names it."""
    reasons: dict[tuple[str, int], str] = {}
    heading, file = "", ""
    for line in document.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        for place in re.finditer(r"`(test_\w+\.py)`:|\b(\d+)\b", line if line.startswith("- `test_") else ""):
            file = place[1] or file
            if place[2]:
                reasons[file, int(place[2])] = heading
    return reasons


def summarise(outcomes: list[Outcome], passed_over: list[str]) -> dict[str, object]:
    """Counts by file and by reason, every disagreement, and what was passed over."""
    wrong = [outcome for outcome in outcomes if not outcome.agrees]
    return {
        "cases": len(outcomes),
        "agreements": len(outcomes) - len(wrong),
        "files": {
            file: {"cases": cases, "agreements": cases - sum(outcome.file == file for outcome in wrong)}
            for file, cases in Counter(outcome.file for outcome in outcomes).items()
        },
        "reasons": dict(Counter(outcome.reason or "unexplained" for outcome in wrong).most_common()),
        "disagreements": [asdict(outcome) for outcome in wrong],
        "no_disagreement_any_more": [f"{each.file}:{each.line}" for each in outcomes if each.agrees and each.reason],
        "passed_over": passed_over,
    }


def describe(summary: dict[str, object], outcomes: list[Outcome]) -> str:
    """The summary for people."""
    verdict = {True: "right", False: "wrong", None: "unscored"}
    lines = [f"{key}: {json.dumps(value, indent=2)}" for key, value in summary.items() if key != "disagreements"]
    for outcome in outcomes:
        if not outcome.agrees:
            lines += [
                f"\n{outcome.file}:{outcome.line}  {outcome.reason or 'UNEXPLAINED'}",
                f"  gold {outcome.gold[:300]!r}  answer {(outcome.answer or '')[:300]!r} ({outcome.code})",
                f"  expected {verdict[outcome.expected]}, got {verdict[outcome.got]}",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
