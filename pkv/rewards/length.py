"""How much a fighter says, in tokens: what is said again, drawn as nothing or only there to be counted isn't paid."""

from __future__ import annotations

import re
import unicodedata
import zlib

from pkv.rewards.context import Context
from pkv.rewards.lexicon import SIGN, pieces
from pkv.rewards.originality import is_attempt

NGRAM = 5  # pieces; a mended equation ("20 / 5 = 4" after "20 / 5 = 5") differs within so many
MOST_ACCENTED = 0.3  # of the letters, as in Vietnamese; French has a tenth
LONGEST_WORD = 30  # characters; a longer one is no word, but filler
# zlib's size in bytes over the characters, below which a text begins to say too little. Measured: counting aloud
# ("I count 1. I count 2.") 0.36 at 150 characters, 0.24 at 400, 0.18 at 1,000, 0.17 at 5,000; working in words and
# formulas 0.73, 0.56, 0.42, 0.31.
DENSITY_FLOOR = 0.25
DENSITY_FLOOR_EXTRA = 50  # over the text's characters: by how much the floor is higher for a short text

_ACCENTED = re.compile("[\u00c0-\u024f\u1e00-\u1eff]")
_BLANKS = "\u115f\u1160\u3164\uffa0\u2800"  # letters and symbols that are drawn as nothing
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")
_WIDE_BLANK = re.compile(r"\n{3,}|[^\S\n]{2,}")
_LONG_WORD = re.compile(rf"[^\s{SIGN}]{{{LONGEST_WORD + 1},}}")


def length(name: str, context: Context) -> float:
    """Linear up to the optimal number of spoken tokens, then falling, to 0 at twice as many."""
    block = context.trace.blocks.get(name)
    if block is None or not is_attempt(name, context):
        return 0.0
    share = spoken_tokens(context.text(name), block.tokens.size) / context.length_optimum
    # Falling counts every token: padding that isn't paid must not shield what is too long.
    excess = block.tokens.size / context.length_optimum
    return max(0.0, min(share, 2.0 - excess, 1.0))


def spoken_tokens(text: str, tokens: int) -> float:
    """How many of a text's tokens say something new.

    A filler character costs as many tokens as it has bytes, the most that a byte-level tokenizer makes of it.
    """
    plain, filler = strip_filler(text)
    said = pieces(plain)
    if not said:
        return 0.0
    share = fresh_pieces(said) / len(said) * said_share(plain)
    return max(0, tokens - filler) * share


def strip_filler(text: str) -> tuple[str, int]:
    """The text without what is only there to be counted, and how many bytes that was."""
    composed = unicodedata.normalize("NFC", text)
    plain = _SUSPECT.sub(lambda match: "" if _is_invisible(match) else match[0], composed)
    plain = _WIDE_BLANK.sub(lambda match: match[0][:2] if match[0][0] == "\n" else " ", plain.strip())
    plain = _LONG_WORD.sub(lambda match: "" if match[0].isalnum() else match[0], plain)
    removed = _bytes(text.strip(" \n")) - _bytes(plain)
    return plain, removed + _ornament(plain)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _ornament(text: str) -> int:
    """The bytes of accents beyond those of any language that is written in Latin letters."""
    accented = _ACCENTED.findall(text)
    spelling = int(MOST_ACCENTED * sum(char.isalpha() for char in text))
    return sum(sorted(_bytes(char) - 1 for char in accented)[spelling:])


def fresh_pieces(said: list[str]) -> int:
    """How many pieces stand in no n-gram that has been said before."""
    seen: set[tuple[str, ...]] = set()
    again = bytearray(len(said))
    for at in range(len(said) - NGRAM + 1):
        gram = tuple(said[at : at + NGRAM])
        if gram in seen:
            again[at : at + NGRAM] = b"\1" * NGRAM
        seen.add(gram)
    return len(said) - sum(again)


def said_share(text: str) -> float:
    """1 for a text that compresses like working, falling to 0 at half of that; by characters, for any script."""
    floor = DENSITY_FLOOR + DENSITY_FLOOR_EXTRA / len(text)
    compressed = len(zlib.compress(text.encode("utf-8", "replace")))
    return min(1.0, max(0.0, 2 * compressed / len(text) / floor - 1))


def _is_invisible(match: re.Match[str]) -> bool:
    char = match[0]
    category = unicodedata.category(char)
    if category == "Mn":
        return not _is_spelling(match.string[max(0, match.start() - 2) : match.start()])
    return char in _BLANKS or category[0] == "C" or category in ("Me", "Zl", "Zp")


def _is_spelling(before: str) -> bool:
    """Whether a mark behind these characters spells a word: in a script that needs marks, and at most two in a row."""
    needs_marks = before[-1:] >= "\u0590" and unicodedata.category(before[-1])[0] in "LM"
    return needs_marks and any(unicodedata.category(char)[0] == "L" for char in before)
