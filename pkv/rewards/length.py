"""How much a fighter says, in tokens: what is said again, drawn as nothing or only there to be counted isn't paid."""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib

from pkv.rewards.context import Context
from pkv.rewards.lexicon import SIGN, is_function_word, pieces
from pkv.rewards.originality import is_attempt
from pkv.rewards.soundness import sound_share

NGRAM = 5  # pieces; a mended equation ("20 / 5 = 4" after "20 / 5 = 5") differs within so many
FORMULA_NGRAM = 8  # signs and numbers only
MOST_ACCENTED = 0.3  # of the letters, as in Vietnamese; French has a tenth
LONGEST_WORD = 30  # characters; a longer one is no word, but filler
TERSE_WORDS = 10  # in a row without a function word; more are not paid
LISTED_NUMBERS = 12  # in a row with nothing worked out between them; more are not paid
# zlib's size in bytes over the characters, below which a text begins to say too little. Measured: counting aloud
# ("I count 1. I count 2.") 0.36 at 150 characters, 0.24 at 400, 0.18 at 1,000, 0.17 at 5,000; working in words and
# formulas 0.73, 0.56, 0.42, 0.31.
DENSITY_FLOOR = 0.25
DENSITY_FLOOR_EXTRA = 50  # over the text's characters: by how much the floor is higher for a short text

_ACCENTED = re.compile("[\u00c0-\u024f\u1e00-\u1eff]")
_BLANKS = "\u115f\u1160\u3164\uffa0\u2800"  # letters and symbols that are drawn as nothing
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")
_WIDE_BLANK = re.compile(r"\n{3,}|[^\S\n]{2,}")
_LISTED = r"-?\d++(?:\.\d++)?[\s,;|]++"
_LIST = re.compile(rf"(?<![\d.,])(?:{_LISTED}){{{LISTED_NUMBERS}}}(?P<more>(?:{_LISTED})++)")
_LONG_WORD = re.compile(rf"[^\s{SIGN}]{{{LONGEST_WORD + 1},}}")


def length(name: str, context: Context) -> float:
    """Linear to the optimal number of spoken tokens, then falling, to 0 at twice as many; false steps aren't paid."""
    block = context.trace.blocks.get(name)
    if block is None or not is_attempt(name, context):
        return 0.0
    spoken = spoken_tokens(context.text(name), block.tokens.size) * sound_share(name, context)
    share = spoken / context.length_optimum
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
    share = fresh_pieces(said) / len(said) * said_share(plain) * (1 - nonsense_share(said))
    return max(0, tokens - filler) * share


def strip_filler(text: str) -> tuple[str, int]:
    """The text without what is only there to be counted, and how many bytes that was."""
    composed = unicodedata.normalize("NFC", text)
    plain = _SUSPECT.sub(lambda match: "" if _is_invisible(match) else match[0], composed)
    plain = _WIDE_BLANK.sub(lambda match: match[0][:2] if match[0][0] == "\n" else " ", plain.strip())
    plain = _LIST.sub(lambda match: match[0][: match.start("more") - match.start()], plain)
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
    """How many pieces stand in no n-gram that has been said before.

    A formula is said again for good reasons, in small parts ("(x + 3)^2"): without a word in it an n-gram is longer.
    """
    again = bytearray(len(said))
    words_before = list(itertools.accumulate(map(_is_word, said), initial=0))
    for size, of_words in ((NGRAM, True), (FORMULA_NGRAM, False)):
        seen: set[tuple[str, ...]] = set()
        for at, gram in enumerate(zip(*(said[shift:] for shift in range(size)), strict=False)):
            if gram in seen and (not of_words or words_before[at] < words_before[at + size]):
                again[at : at + size] = b"\1" * size
            seen.add(gram)
    return len(said) - sum(again)


def _is_word(piece: str) -> bool:
    return len(piece) > 1 and piece.isalpha()


def nonsense_share(said: list[str]) -> float:
    """The share of the characters in Latin words that stand in a row too long without a function word or equals sign.

    In any language every few words one is a function word; noise beside a right equation has none. Other scripts are
    let pass: their function words are in no list here.
    """
    row = characters = 0
    for piece in said:
        if piece == "=" or is_function_word(piece):
            row = 0
        elif _is_word(piece) and piece < "\u0250":
            row += 1
            characters += len(piece) * (row > TERSE_WORDS)
    return characters / sum(map(len, said))


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
