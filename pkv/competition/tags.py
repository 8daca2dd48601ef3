"""The twelve tags in a text: where they stand, and which of them are damaged. One linear scan, no XML.

A tag counts only as `<name>` or `</name>`, in just these letters. Whatever a person or a renderer would still read as
one (attributes, other case, escapes, look-alike letters and brackets, code fences) is found too, marked as damaged.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from pkv.records import Span

MOST_TAGS = 1000  # of a response; a competition has twelve, and what stands behind so many is no part of one
TAGS = ("competition", "pirate", "knight", "viking", "result", "winner")
# The twelve tags in their one right order.
ORDER = (
    *("<competition>", "<pirate>", "</pirate>", "<knight>", "</knight>", "<viking>", "</viking>"),
    *("<result>", "<winner>", "</winner>", "</result>", "</competition>"),
)


class Tag(NamedTuple):
    """One tag in a text. damage: "" for a tag that counts, else "attribute", "fenced" or "disguised"."""

    name: str
    closing: bool
    chars: Span
    damage: str = ""

    @property
    def form(self) -> str:
        """The tag as it should be written, such as `</pirate>`."""
        return f"</{self.name}>" if self.closing else f"<{self.name}>"


def scan(text: str, most: int | None = MOST_TAGS) -> tuple[Tag, ...]:
    """The first `most` tags of the construct in a text (None: all), damaged ones too, left to right; linear."""
    found = [_classify(text, match) for match in itertools.islice(_pattern().finditer(fold(text)), most)]
    if not any(tag.damage == "" for tag in found):
        return tuple(found)
    fences = _fences(text)
    fence = next(fences, None)
    for place, tag in enumerate(found):
        while fence is not None and fence.stop <= tag.chars.start:
            fence = next(fences, None)
        start, stop = tag.chars
        in_fence = fence is not None and fence.start <= start
        in_code = start > 0 and text[start - 1] == "`" and text[stop : stop + 1] == "`"
        if not tag.damage and (in_fence or in_code):
            found[place] = tag._replace(damage="fenced")
    return tuple(found)


def has_tag(text: str) -> bool:
    """Whether any tag of the construct stands in the text, in any disguise."""
    return _pattern().search(fold(text)) is not None


def fence_behind(line: str, mark: str) -> str:
    """The mark of the code fence that is open behind a line, "" for none; mark: of the one that is open before it."""
    found = _FENCE.match(line)
    if found is None:
        return mark
    info = found["info"].strip()
    if mark:
        return "" if not info and found["mark"].startswith(mark) else mark
    return "" if "`" in info else found["mark"]


def fold(text: str) -> str:
    """The text as it looks: lower case, look-alikes as the letter they look like, invisible characters as NUL.

    The length stays, so that places in the folded text are places in the text.
    """
    return text.lower() if text.isascii() else text.translate(_fold_table())


def _classify(text: str, match: re.Match[str]) -> Tag:
    start, stop = match.span()
    name = _BY_INITIAL[match["name"][0]]
    closing = "/" in match["lead"]
    form = f"</{name}>" if closing else f"<{name}>"
    damage = "disguised"
    if stop - start == len(form) and text.startswith(form, start):
        damage = "disguised" if _is_escaped(text, start) else ""
    elif match["attribute"] and text.startswith(form[:-1], start):
        damage = "attribute"
    return Tag(name, closing, Span(start, stop), damage)


def _is_escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before a place (an even one is LaTeX's line break)."""
    start = at
    while start > 0 and text[start - 1] == "\\":
        start -= 1
    return (at - start) % 2 == 1


_FENCE = re.compile(r"^ {0,3}(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)


def _fences(text: str) -> Iterator[Span]:
    """Markdown's fenced code blocks; a fence that never closes is none."""
    start, mark = 0, ""
    for line in _FENCE.finditer(text):
        before, mark = mark, fence_behind(line[0], mark)
        if mark and not before:
            start = line.start()
        elif before and not mark:
            yield Span(start, line.end())


_BY_INITIAL = {name[0]: name for name in TAGS}  # the six initials differ
# What may stand inside a tag and still be overlooked by a reader: blanks, invisible characters, emphasis, separators.
_NOISE = r"\x00-\x20\x7f\s*_`~'\"\\|!.$-"


@functools.cache
def _pattern() -> re.Pattern[str]:
    """A tag in a folded text. Every repetition is bounded and no window crosses the next bracket: linear."""
    # The first character is a plain set, so that the search skips to it. A bracket of another kind, or a quotation
    # mark, opens a tag only before a slash: `a[result]` is code, `[/result]` is not.
    opener = (
        r"[<&\\%\[{«《⟪](?:(?<=<)|(?<=&)(?:amp;){0,3}(?:lt|lang|langle|#0{0,6}60|#x0{0,6}3c);?"
        rf"|(?<=\\)\\?(?:langle|lt|textless|u003c|x3c)|(?<=%)3c|(?<=[\[{{«《⟪])(?=[{_NOISE}]{{0,4}}/))"
    )
    closer = r"(?:[>\]}»》⟫]|&(?:amp;){0,3}(?:gt|rang|rangle|#0{0,6}62|#x0{0,6}3e);?"
    closer += r"|\\\\?(?:rangle|gt|textgreater|u003e|x3e)|%3e)"
    names = "|".join(rf"(?:[{_NOISE}]{{0,2}}|\x00{{0,16}})".join(name) for name in TAGS)
    # Without its closing bracket it is a tag only when nothing stands between: `a < result` is mathematics.
    unclosed = r"(?(tight)(?=[^\S\n]{0,8}(?:\n|<|\Z))|(?!))"
    return re.compile(
        rf"{opener}(?P<tight>(?=/?[a-z]))?(?P<lead>[{_NOISE}/]{{0,8}})(?P<name>{names})(?![a-z0-9])"
        rf"(?:[{_NOISE}/]{{0,8}}{closer}|(?P<attribute>[\s/=:][^<>\n]{{0,160}}>)|{unclosed})"
    )


# Letters of other alphabets that look like those in the six names (Unicode NFKD has no word on them).
_LOOK_ALIKES = dict(
    zip(
        "асеһікӏорѕтѵԝмпгυν" + "αεικορτωηɡıɪᴘʀᴀᴛᴇɢʜɴᴋᴠʟᴜꜱᴡᴏᴍᴄ",
        "acehiklopstvwmnruv" + "aeikoptwngiiprateghnkvluswomc",
        strict=True,
    )
)
_BRACKETS = dict.fromkeys("＜﹤‹⟨〈〈❬❮❰ᐸ˂≺⧼⪡", "<") | dict.fromkeys("＞﹥›⟩〉〉❭❯❱ᐳ˃≻⧽⪢", ">")
_SLASHES = dict.fromkeys("∕⁄／⧸╱", "/")
_BLANKS = "\u115f\u1160\u3164\uffa0\u2800"  # letters and symbols that are drawn as nothing


class _FoldTable(dict[int, str]):
    """`str.translate` table that works out a character when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _fold_character(chr(code))
        return folded


@functools.cache
def _fold_table() -> _FoldTable:
    return _FoldTable()


def _fold_character(char: str) -> str:
    for table in (_BRACKETS, _SLASHES, _LOOK_ALIKES):
        if char in table:
            return table[char]
    if char in _BLANKS or unicodedata.category(char) in ("Cf", "Mn", "Me"):
        return "\0"
    base = "".join(
        c for c in unicodedata.normalize("NFKD", char) if unicodedata.category(c) not in ("Mn", "Me")
    ).lower()
    base = base if len(base) == 1 else char
    return _LOOK_ALIKES.get(base, base)
