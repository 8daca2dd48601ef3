"""The fighters' words, the cues of a correction and the small words of English: data in lexicon.json, read once."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources

# Each sign of a script that puts no blanks between words is a word: kana, Han, Thai, Lao and Khmer.
SIGN = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
LANGUAGE = 0.1  # share of function words below which words are no language
_MARK = "\u0300-\u036f\u0900-\u0dff"  # combining marks, and the Indic scripts, where \w has no word on vowel signs
_COMMAND = r"\\[A-Za-z]+"  # of LaTeX; its braces and dollars are layout
PIECE = re.compile(rf"{_COMMAND}|[{SIGN}]|(?:[^\W_{SIGN}]|[{_MARK}])+(?:['’][^\W_{SIGN}]+)*|[^\w\s{{}}$]|_")
_ONE_SIGN = re.compile(f"[{SIGN}]")
WORD = re.compile(rf"[{SIGN}]|(?:[^\W\d_{SIGN}]|[{_MARK}])+(?:['’][^\W\d_{SIGN}]+)*")


@dataclass(frozen=True)
class Lexicon:
    """personas: words by fighter. cues: matches any phrase that announces a correction. small: English function words.

    function_words: these and those of some languages that are often met beside English, for telling prose from noise.
    """

    personas: Mapping[str, frozenset[str]]
    cues: re.Pattern[str]
    small: frozenset[str]
    function_words: frozenset[str]
    numbers: Mapping[str, int]  # what a number word says

    @property
    def persona_words(self) -> frozenset[str]:
        return frozenset().union(*self.personas.values())


@functools.cache
def lexicon() -> Lexicon:
    """The lexicon that ships with pkv."""
    raw = json.loads(resources.files("pkv.rewards").joinpath("lexicon.json").read_text(encoding="utf-8"))
    phrases = sorted(raw["cues"], key=len, reverse=True)
    bounded = (re.escape(phrase) + (r"\b" if phrase[-1].isalpha() else "") for phrase in phrases)
    return Lexicon(
        personas={name: frozenset(words) for name, words in raw["personas"].items()},
        cues=re.compile(r"\b(?:" + "|".join(bounded) + ")"),
        small=frozenset(raw["function_words"]),
        function_words=frozenset(raw["function_words"] + raw["foreign_function_words"]),
        numbers=raw["number_words"],
    )


def pieces(text: str) -> list[str]:
    """Words, numbers, LaTeX commands and single signs, in lower case: what a reader sees, whatever the tokenizer."""
    return PIECE.findall(text.casefold())


def words(text: str) -> list[str]:
    """Words only, in lower case."""
    return WORD.findall(text.casefold())


def is_function_word(word: str) -> bool:
    """Whether it is a function word of a language that is listed, or a sign of a script without blanks."""
    return word in lexicon().function_words or is_sign(word)


def is_language(said: Sequence[str]) -> bool:
    """Whether words are a language's: enough of them are function words, or signs of a script without blanks."""
    return sum(map(is_function_word, said)) >= LANGUAGE * len(said)


def is_sign(word: str) -> bool:
    """Whether a word is a sign of a script without blanks."""
    return len(word) == 1 and _ONE_SIGN.match(word) is not None


def number_words(said: Sequence[str]) -> list[Fraction]:
    """What the number words among some words say; "one" is left out, for it is said of anything."""
    return [Fraction(lexicon().numbers[word]) for word in said if word in lexicon().numbers]
