"""The fighters' words, the cues of a correction and the small words of English: data in lexicon.json, read once."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

PIECE = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Lexicon:
    """personas: words by fighter. cues: matches any phrase that announces a correction. small: function words."""

    personas: Mapping[str, frozenset[str]]
    cues: re.Pattern[str]
    small: frozenset[str]

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
    )


def pieces(text: str) -> list[str]:
    """Words, numbers and single signs, in lower case: what a reader sees, whatever the tokenizer."""
    return PIECE.findall(text.casefold())


def words(text: str) -> list[str]:
    """Words only, in lower case."""
    return WORD.findall(text.casefold())
