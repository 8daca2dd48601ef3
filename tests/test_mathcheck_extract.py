"""extract.py: the stated answer is read, an unclear one is a coded failure, and no text is slow."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkv.mathcheck import extract_answer, is_right

HIVES = (
    "The viking carried the day: each hive yields 4 candles, so the pirate and the knight both agreed with their "
    "answer of 24 hives needed to make 96 candles."
)
READS = {
    HIVES: ("24", "phrase"),
    "Answer: 24": ("24", "marker"),
    "work\n\n**Answer:** 24": ("24", "marker"),
    "**Final Answer: 24**\n\nI hope this helps with all 96 candles!": ("24", "marker"),
    "Final answer: $24$.": ("24", "marker"),
    "Answer: $24": ("$24", "marker"),
    "The answer is: 24 hives": ("24 hives", "marker"),
    "Answer:\n\n$$24$$\n": ("24", "marker"),
    "Answer: 20\nNo, I was wrong.\nAnswer: 24": ("24", "marker"),
    "Answer: The farmer needs 24 hives in all.": ("24", "marker"),
    "Answer: the Battle of Hastings won": ("the Battle of Hastings won", "marker"),
    "Answer: It is 24": ("24", "marker"),
    "Answer: $n$ equals 24": ("24", "marker"),
    "Answer: $\\{n : n \\text{ is below } 24\\}$": ("\\{n : n \\text{ is below } 24\\}", "marker"),
    "It had 96. Final answer: She needs just 24 hives. I hope that it is right, 4 times.": ("24", "marker"),
    "so \\boxed{96} candles. Final Answer: The final answer is $24$. I hope it is correct.": ("24", "marker"),
    "Final answer: 20. No! **Final answer: 24.**": ("24", "marker"),
    "Let us see. Final answer: 20. So \\boxed{24}": ("24", "boxed"),
    "\\boxed{20}, no: \\boxed{24}": ("24", "boxed"),
    "so \\boxed{\\frac{\\sqrt{3}}{2}} holds": ("\\frac{\\sqrt{3}}{2}", "boxed"),
    "\\boxed{\\{1, 2\\}}": ("\\{1, 2\\}", "boxed"),
    "\\boxed{5!}": ("5!", "boxed"),
    "Answer:\n$$\nx^2 + 1\n$$\nas asked": ("x^2 + 1", "marker"),
    "Answer: \\[\n7\n\\]": ("7", "marker"),
    "\\boxed{24} and then \\boxed{25": ("24", "boxed"),
    "Answer: \\boxed{24}": ("24", "boxed"),
    "\\boxed{20}\nAnswer: 24": ("24", "marker"),
    "Answer: 20\n\\boxed{24}": ("24", "boxed"),
    "With 96 candles, the answer is 24.": ("24", "phrase"),
    "96 candles. The answer to the question of how many hives is **24**.": ("24", "phrase"),
    "Here is the answer to your question about 96 candles: 24 hives.": ("24", "phrase"),
    "96 candles. The answer is that she needs 24 of them": ("24", "phrase"),
    "The answer is $\\frac{3}{4}$, not 2.": ("\\frac{3}{4}", "phrase"),
    "Arr, 96 it says; the answer be 24 hives!": ("24", "phrase"),
    "The answer is 20. Wait, that is not so. The answer is 24.": ("24", "phrase"),
    "The first answer of 20 missed 4. The answer is 24.": ("24", "phrase"),
    "She needs a third: $\\frac13 $": ("\\frac13", "only_number"),
    "The answer is Tuesday.": ("Tuesday", "phrase"),
    "For all 96 the answer is $x + y$.": ("x + y", "phrase"),
    "The answer is \\(k\\).": ("k", "phrase"),
    "The answer is that $x$ is 24.": ("24", "phrase"),
    "$x + y$": ("x + y", "only_number"),
    "$$g(t) = t$$\n": ("g(t) = t", "only_number"),
    "The line is $2x + 3y = 12$.": ("2x + 3y = 12", "only_number"),
    "$r^2 + s^2 = 0$": ("r^2 + s^2 = 0", "only_number"),
    "Then \\(A = 6s^2 = 24\\).": ("24", "phrase"),
    "First x = 12, then x = 24": ("24", "phrase"),
    "$t = -4, t = 24$": ("t = -4, t = 24", "only_number"),
    "Each makes 4, so 96 / 4 = 24.": ("24", "phrase"),
    "\\[ 96 / 4 = 24 \\]": ("24", "phrase"),
    "She needs 24 hives; yes, 24.": ("24", "only_number"),
    "It costs $1,234.50 today.": ("$1,234.50", "only_number"),
    "She needs a third of them: \\(\\frac{1}{3}\\).": ("\\frac{1}{3}", "only_number"),
}
FAILS = {
    "": "none",
    "She needs hives.": "none",
    "\\boxed{": "none",
    "She needs 24 hives for 96 candles.": "ambiguous",
    "It costs $24 and $36.": "ambiguous",
    "The answer is not 25 but 24.": "ambiguous",
    "The knight's answer of 24 beats the pirate's answer of 20.": "ambiguous",
    "Answer: it may well be 24, though I like the number 25": "ambiguous",
    "x = 2 or x = 3": "ambiguous",
    "x = 2, x = 3": "ambiguous",
    "$x = 2$ and $x = 3$.": "ambiguous",
    "Let $x$ be the number of hives.": "none",
    "What the answer is not: $x$.": "none",
    "It is $2x = 48$ and so $3x = 72$.": "ambiguous",
}


@pytest.mark.parametrize(("text", "expected"), READS.items())
def test_a_stated_answer_is_read(text: str, expected: tuple[str, str]) -> None:
    found = extract_answer(text)
    assert (found.value, found.code) == expected
    assert found.span is not None and text[found.span.start : found.span.stop] == found.value


@pytest.mark.parametrize(("text", "code"), FAILS.items())
def test_an_unclear_answer_is_a_coded_failure(text: str, code: str) -> None:
    found = extract_answer(text)
    assert (found.value, found.code, found.span) == (None, code, None)


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 41=42",
        "\\boxed{41=42}",
        "Answer: 3 or 42",
        "Answer: 42, 43",
        "\\boxed{42 \\text{ or } 43}",
        "The answer is 42 or 43.",
        "The answer is 42 hives or 43 hives.",
        "The answer is 42 and 43.",
        "The answer is 41 = 42.",
        "Answer: 42\nAnswer: 43",
        "\\boxed{42} or rather \\boxed{43}",
        "The answer is 42. The answer is 43.",
        "Answer: between 41 and 42",
        "Answer: \\pm 42",
        "It is 7. Final answer: 41 or 42.",
        "It is 7. Final answer: 42. Final answer: 43.",
        "Answer: it is 41 or 42",
        "Answer: it is 41 = 42",
        "Answer: so that it must be 41 = 42",
        "$x = 41, x = 42$",
        "x = 41, x = 42",
        "The answer is minus 42.",
        "The answer is half of 42.",
        "The answer is less than 42.",
        "The answer is 42 squared.",
        "The answer is 42 \u2212 1.",
        "The answer is 42 \u00b7 43.",
        "The answer is 42 (or 43).",
        "The answer is 42, maybe 43.",
        "The answer is 42; if not, 43.",
        "The answer is 42 vs 43.",
        "The answer is 42 minus 3.",
        "The answer is 42 more than 3.",
        "The answer is 42x.",
        "The answer is unlikely to be 42.",
        "Answer: 42 is wrong",
        "Answer: 42 (or 43)",
        "Answer: 4 2",
        "The answer is 6 \u00b7 7 = 42.",
    ],
)
def test_hedging_and_chaining_are_never_right(text: str) -> None:
    value = extract_answer(text).value
    assert value is None or not is_right(value, "42")


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42, as may be checked: 6 * 7 is what 6 hives make.",
        "The answer is 42 times.",
        "The answer is 42 fewer than Tom.",
        "The answer is 42 more than before.",
        "Answer: She cannot buy more than 42 candles.",
        "The answer is not obvious, but it is 42.",
    ],
)
def test_words_around_an_answer_do_not_make_it_another_one(text: str) -> None:
    value = extract_answer(text).value
    assert value is not None and is_right(value, "42")


def test_a_correction_is_not_punished() -> None:
    for text in ("\\boxed{41} no, \\boxed{42}", "Answer: 41\nAnswer: 42", "The answer is 41. Wait! The answer is 42."):
        value = extract_answer(text).value
        assert value is not None and is_right(value, "42")


PIECES = [
    "answer ",
    "Answer: ",
    "answer is ",
    "\\boxed{",
    "{",
    "}",
    "$",
    "$$",
    "\\[",
    "\\(",
    "1,111",
    "1/2 ",
    "= ",
    "**",
    "\n",
]
PIECES += ["$x$ ", ". Final answer: ", "x = 2, "]
PIECES += [" or ", "24 ", "not ", "- ", "#### ", "\\frac{1}{2}", "Answer:\n", "\\", "٤", " \t", "3.", "the "]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear_in_the_text(piece: str) -> None:
    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece))
        best = 9.0
        for _ in range(2):
            started = time.process_time()
            extract_answer(text)
            best = min(best, time.process_time() - started)
        return best

    # Quadratic time would be 64 times as long; the floor keeps a busy machine from failing it.
    assert seconds(80_000) < max(0.5, 24 * seconds(10_000))


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_no_text_raises_and_spans_point_at_values(text: str) -> None:
    found = extract_answer(text)
    if found.span is None:
        assert found.value is None and found.code in ("ambiguous", "none")
    else:
        assert found.value == text[found.span.start : found.span.stop] != ""
