"""Finds the answer that prose states: "their answer of 24 hives needed to make 96 candles", "= 24" at the very end.

All repetitions in the patterns are bounded or possessive, and so are all windows: no text takes more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pkv.mathcheck.numbers import parse_number
from pkv.records import Span

# A formula between delimiters, or a number. As in pandoc, the dollar of a formula touches it ("$24 and $36" is money),
# unless a LaTeX command tells what it is.
_CANDIDATE = re.compile(
    r"""
    \$\$\s{0,4}(?P<display>[^$]{1,200})\$\$
  | (?<![\\\w$])\$(?=[^\s$])(?P<inline>[^$\n]{1,200})(?<=\S)\$(?![\d$])
  | (?<![\\\w$])\$(?P<spaced>[^$\n\\]{0,100}\\[A-Za-z][^$\n]{0,200})\$(?![\d$])
  | \\\((?P<round>(?:(?!\\[()])[^\n]){1,200})\\\)
  | \\\[(?P<square>(?:(?!\\[\[\]]).){1,200})\\\]
  | (?P<number>
      (?<![\w.\\])(?:[+\-\u2212](?=[\d.$\\\u20ac\u00a3]))?(?:\\?\$|[\u20ac\u00a3])?
      (?>
          \d{0,9}\\[dt]?frac\{-?\d{1,20}\}\{\d{1,20}\}
        | [1-9]\d{0,2}(?:,\d{3})++(?!\d)(?:\.\d++)?
        | \d++[ ]\d++/\d++
        | (?:\d++(?:\.\d++)?|\.\d++)(?:/\d++)?
      )
      (?!(?:st|nd|rd|th)\b)
      (?:\s?\\?%|[ ]percent\b|[ ](?:hundred|thousand|million|billion|trillion|dozen)\b)?
    )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
WORDS_FOR_ANSWER = r"answer|respuesta|r[e\u00e9]ponse|antwort|risposta|resposta|\u043e\u0442\u0432\u0435\u0442"
SIGNS_FOR_ANSWER = r"\u7b54\u6848|\u7b54\u3048"  # Chinese, Japanese
_ANSWER = re.compile(rf"\b(?:{WORDS_FOR_ANSWER})\b|{SIGNS_FOR_ANSWER}", re.IGNORECASE)
_WINDOW = 200  # characters after the word "answer" in which its value is looked for
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')]|$)|(?<!:)\n[ \t]{0,8}\n")
_OPENING = r"[\s*_,:(\[{\\\"'$=~\u2248-]{0,12}"
# A verb that states, and at most five words of filling: "the answer is that the farmer needs 24". Or nothing at all.
_STATES = re.compile(
    rf"(?:(?:\b(?:is|was|be|of|equals|being|becomes|es|ist|est|\u00e8|\u00e9)\b|[\u662f\u306f])[^\w]{{0,6}}(?:[A-Za-z']{{1,20}}[^\w]{{1,6}}){{0,5}}|[:=\uff1a]){_OPENING}$",
    re.IGNORECASE,
)
_TOUCHES = re.compile(_OPENING)
_DENIES = re.compile(
    r"\b(?:not|never|cannot|neither|hardly|unlikely|wrong|incorrect|rather than|instead of)\b|n't\b", re.IGNORECASE
)
# Before a number or behind it, what makes another number of it.
_CHANGES = re.compile(
    r"\b(?:minus|negative|half(?: of)?|twice|double|triple|thrice"
    r"|(?:less|more|fewer|greater|smaller|larger) than)\W{1,4}$",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    r"\s?\^\s?\{?[\d-]|[eE]\d|\s?\\(?:pi|sqrt|ln|log)(?![A-Za-z])"
    r"|[*_$)\s]{0,4}\b(?:squared|cubed|factorial|dozens|lakhs?|crores?|scores?|gross|hundreds|thousands|millions|billions"
    r"|(?:times|minus|plus|divided by|(?:less|more|fewer) than)\s{1,3}\$?\d)|[xyznk]\b",
    re.IGNORECASE,
)
# What gives a second answer beside the first, just before it: "24, maybe 25". "24, as may be shown: 6 * 4" gives none.
_HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibly|alternatively|otherwise|versus|vs|(?:could|might|may) be|if not|else)\b"
    r"\W{1,4}$",
    re.IGNORECASE,
)
_BUT = re.compile(r"\bbut\b", re.IGNORECASE)
# A marked value that is taken back at once: "42 is wrong".
TAKEN_BACK = re.compile(
    r"\d\S{0,20}\s{1,3}(?:[A-Za-z]{1,20}\s{1,3}){0,3}(?:is|are|was|be)\s{1,3}"
    r"(?:not|wrong|incorrect|false)\b",
    re.IGNORECASE,
)
# A value that is denied behind it, in the same sentence: "the answer is 30, which is wrong".
_DENIED_BEHIND = re.compile(
    r"[^.!?\n\d]{0,30}\b(?:which|that) (?:is|was) (?:wrong|incorrect|false|not)\b", re.IGNORECASE
)
_RECANTS = re.compile(r"\b(?:no,? wait|wait,? no|correction|scratch that)\b[^.!?\n]{0,60}\d", re.IGNORECASE)
# "6 hives make **24** candles.": the only bold number, in the last sentence, behind its verb.
_BOLD = re.compile(r"\*\*(?P<value>[^*\n]{1,60})\*\*")
_BOLD_END = re.compile(
    r"\b(?:is|are|be|makes?|gives?|equals)\s{1,3}\*\*(?P<value>[^*\n]{1,60})\*\*[^*\d\n]{0,80}$", re.IGNORECASE
)
_DISOWNED = re.compile(
    r"\b(?:wrong|incorrect|mistaken|false|flawed|first|initial|earlier|previous|original|naive|tempting)\s{1,3}$",
    re.IGNORECASE,
)
# What makes a list, a range or a formula of a stated value: "24 or 25", "24 hives or 25", "41 = 42", "3, 5", "8 * 3".
_GOES_ON = re.compile(
    r"(?:\s[A-Za-z]{1,20}){0,3}\s?,?\s{1,3}\(?(?:or|ou|oder)\s{1,3}(?:[A-Za-z]{1,20}\s){0,2}|\s{0,3}(?:[=/+*\u2248\u00b1\u00d7\u00f7\u00b7\u22c5\u2212\u2192|<>~^&-]|\\times|\\cdot|\\div|\\pm)\s{0,3}"
    r"|\s?[,;]\s{0,3}(?:and\s)?|\s{1,3}(?:and|to)\s{1,3}|\s?\u2013\s?"
)
_DELIMITER = re.compile(r"\\[()]|\$|\*\*|(?<! )\*|\*(?! )")  # of formulas and emphasis; ` * ` multiplies
_ALTERNATIVE = re.compile(r"\bor\b|\\pm(?![A-Za-z])|\u00b1", re.IGNORECASE)
_ENDING = re.compile(
    r"(?<![!<>=])=(?P<value>[^=]{1,64})$",
)
_CLOSING = " \t\n.!*$"
# A formula that is an equation in unknowns states no value: "$2x + 3y = 7$", "$x^2 = 16$". Nor is the last of two
# values side by side the answer: "x = 2, x = 3", "x = 3, y = 5".
_UNKNOWN = re.compile(r"(?<![A-Za-z\\])(?:\d[A-Za-z](?![A-Za-z])|[A-Za-z]\s?\^)")
_OPENS = re.compile(r"\$|\\[(\[]")
_NAMED_BESIDE = re.compile(
    r"(?<![A-Za-z\\])[A-Za-z](?:_?\w)?\s?=[^=]{1,64}(?:[,;]|\band\b)[^=A-Za-z]{0,6}[A-Za-z](?:_?\w)?\s?$"
)
_FORMULA_VALUE = re.compile(
    r"(?:\b(?:is|was|be)\b|:)\s{0,3}[*_]{0,3}(?P<value>\$[^$\n]{1,100}\$|\\\((?:(?!\\[()])[^\n]){1,100}\\\))[*_\s]{0,3}$",
    re.IGNORECASE,
)
_TEXT_VALUE = re.compile(
    r"(?:\b(?:is|was|be)\b|:)\s{0,3}"
    r"(?P<value>[*\"']{0,3}[A-Za-z][A-Za-z'-]{0,30}(?: [A-Za-z][A-Za-z'-]{0,30}){0,4}[*\"']{0,3})$",
    re.IGNORECASE,
)


class AmbiguousError(Exception):
    """The prose states more than one answer, or none among several numbers."""


def find_candidates(text: str, span: Span) -> Iterator[Span]:
    """Numbers, and formulas with a digit or a command in them, in order; any formula where the text is nothing else."""
    whole = trim(text, span)
    for match in _CANDIDATE.finditer(text, span.start, span.stop):
        kind = match.lastgroup or "number"
        if kind == "number" or re.search(r"[\d\\]", match[kind]) or trim(text, Span(*match.span())) == whole:
            yield Span(*match.span(kind))


def read_phrase(text: str, span: Span, candidates: Sequence[Span], closing: bool = True) -> Span | None:
    """The value of the last phrase that states the answer, or of a closing `= 24` if wanted. Raises AmbiguousError."""
    stated: list[tuple[int, Span | None]] = []  # where the sentence ends, and the value; None where it is unclear
    index, words_end = 0, None
    for word in _ANSWER.finditer(text, span.start, span.stop):
        while index < len(candidates) and candidates[index].start < word.end():
            index += 1
        if _DISOWNED.search(text[max(span.start, word.start() - 24) : word.start()]):
            continue
        limit = min(span.stop, word.end() + _WINDOW)
        end = _SENTENCE_END.search(text, word.end(), limit)
        sentence_end = end.start() if end else limit
        words_end = Span(word.end(), sentence_end)
        try:
            value = _stated(text, words_end, candidates, index) or _stated_formula(text, words_end)
        except AmbiguousError:
            stated.append((sentence_end, None))
            continue
        if value:
            stated.append((sentence_end, value))
    if stated:
        sentence_end, value = stated[-1]
        rivals = [other for end, other in stated[-8:] if end == sentence_end]
        recanted = _RECANTS.search(text, sentence_end, min(span.stop, sentence_end + _WINDOW))
        if recanted or None in rivals or len({_key(text, rival) for rival in rivals if rival}) > 1:
            raise AmbiguousError
        return value
    if closing and (value := _closing_value(text, span) or _bold_value(text, span)):
        return value
    if not candidates and words_end:  # an answer in words: "the answer is Tuesday"
        match = _TEXT_VALUE.search(text[words_end.start : words_end.stop])
        return Span(words_end.start + match.start("value"), words_end.start + match.end("value")) if match else None
    return None


def read_only_number(text: str, candidates: Sequence[Span]) -> Span | None:
    """The one number or formula of the prose, said again or not; None where there is none. Raises AmbiguousError."""
    first: object = None
    for spelling in dict.fromkeys(text[start:stop] for start, stop in candidates):
        key = _key(spelling, Span(0, len(spelling)))
        if first is not None and key != first:
            raise AmbiguousError
        first = key
    return candidates[-1] if candidates else None


def first_sentence(text: str, span: Span) -> Span:
    """The part of a span up to its first full stop."""
    end = _SENTENCE_END.search(text, span.start, span.stop)
    return Span(span.start, end.start()) if end else span


def trim(text: str, span: Span, punctuation: str = ".,;!") -> Span:
    """The span without white space, emphasis, closing punctuation and the math delimiters around all of it."""
    start, stop = span
    while True:
        before = start, stop
        while start < stop and (text[start].isspace() or text[start] in "*_"):
            start += 1
        while start < stop and (text[stop - 1].isspace() or text[stop - 1] in "*_" + punctuation):
            # The backslash of `\\,` and `\\!` is no answer either; one of `\\;` neither.
            stop -= 2 if text[stop - 1] in ",;!" and text[stop - 2 : stop - 1] == "\\" and stop - 2 >= start else 1
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner, outer = start + len(opening), stop - len(closing)
            encloses = inner < outer and text.startswith(opening, start) and text.startswith(closing, outer)
            if encloses and text.find(opening, inner, outer) < 0 and text[outer - 1] != "\\":
                start, stop = inner, outer
                break
        if before == (start, stop):
            return Span(start, stop)


def _key(text: str, span: Span) -> object:
    """Equal for two candidates that state the same."""
    span = trim(text, span)
    value = text[span.start : span.stop]
    number = parse_number(value)
    return value if number is None else number


def _stated(text: str, sentence: Span, candidates: Sequence[Span], index: int) -> Span | None:
    """The first candidate in the rest of a sentence after the word "answer" that is stated as its value.

    Raises AmbiguousError where a value is denied, or is made another one by the words around it.
    """
    before, denied = sentence.start, False
    while index < len(candidates) and candidates[index].start < sentence.stop:
        value, gap = candidates[index], text[before : candidates[index].start]
        touches = before == sentence.start and _TOUCHES.fullmatch(gap)
        states = touches or _STATES.search(gap)
        denies = _DENIES.search(_BUT.split(gap)[-1]) or _DENIED_BEHIND.match(text, value.stop)
        denied |= bool(states and denies)
        if states and not denies:
            if _CHANGES.search(gap) or _CHANGED.match(text, value.stop):
                raise AmbiguousError
            return _whole_value(text, value, candidates[index + 1 : index + 9])
        before = value.stop
        index += 1
    if denied:
        raise AmbiguousError
    return None


def _stated_formula(text: str, sentence: Span) -> Span | None:
    """The formula, be it of letters only, that a sentence ends with after its verb: "the answer is $x + y$"."""
    match = _FORMULA_VALUE.search(text[sentence.start : sentence.stop])
    if match is None or _DENIES.search(match.string, 0, match.start("value")):
        return None
    return Span(sentence.start + match.start("value"), sentence.start + match.end("value"))


def _whole_value(text: str, value: Span, following: Sequence[Span]) -> Span:
    """The value with what is listed or chained to it, so that "24 or 25" is read as both and never passes as one."""
    for other in following:
        between = text[value.stop : other.start]
        if len(between) > 120:
            break
        between = _DELIMITER.sub("", between)
        bracketed = between.strip() == "(" and text.startswith(")", other.stop)  # 24 (25)
        if not _GOES_ON.fullmatch(between) and not _HEDGES.search(between) and not bracketed:
            break
        value = Span(value.start, other.stop)
    return value


def _closing_value(text: str, span: Span) -> Span | None:
    """The number after an equals sign that ends the text, unless it is no value or one of several."""
    stop = span.stop
    while stop > span.start and (text[stop - 1] in _CLOSING or text[stop - 2 : stop] in ("\\)", "\\]")):
        stop -= 2 if text[stop - 1] in ")]" else 1
    start = max(span.start, stop - _WINDOW)
    line = text[start:stop].rpartition("\n")[2]
    match = _ENDING.search(line)
    if match is None or _ALTERNATIVE.search(line) or parse_number(match["value"]) is None:
        return None
    left = line[: match.start()]
    _, *formulas = _OPENS.split(left)
    if (formulas and "=" not in formulas[-1] and _UNKNOWN.search(formulas[-1])) or _NAMED_BESIDE.search(left):
        return None
    return Span(stop - len(match["value"]), stop)


def _bold_value(text: str, span: Span) -> Span | None:
    """The only bold number, where the text ends with it as what something is or makes."""
    match = _BOLD_END.search(text, max(span.start, span.stop - _WINDOW), span.stop)
    if match is None or parse_number(match["value"]) is None:
        return None
    bold = [found for found in _BOLD.finditer(text, span.start, span.stop) if parse_number(found["value"]) is not None]
    return Span(*match.span("value")) if len(bold) == 1 else None
