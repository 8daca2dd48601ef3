"""What a row's text asks of the engine while it is written: to end at a stop string, to close a block that is too long.

The engine knows tokens only; here they become text as they come, and no piece costs more because much was said before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pkv.competition.tags import Tag, fence_behind, scan
from pkv.competition.tokenizer import Tokenizer
from pkv.config import UserError
from pkv.records import FIGHTERS, Verdict, Watch

_NONE = np.zeros(0, np.int32)
_TAIL = 64  # characters of a line that are kept: a tag, and the backslashes or the code mark before it


def stop_strings(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[], Watch]:
    """Watches that end a row at the first token with which its text contains one of the strings; that token stays.

    A string that spells a control token, as "<|im_end|>", is that token too. Raises UserError for an empty string, and
    for one with U+FFFD, which stands for bytes that are no text.
    """
    for string in strings:
        if not string or "\ufffd" in string:
            raise UserError(f"stop string: got {string!r}, expected at least one character, and none that is U+FFFD")
    return lambda: _StopStrings(tokenizer, strings)


def block_budget(tokenizer: Tokenizer, tokens: int) -> Callable[[], Watch]:
    """Watches that close a fighter's block behind its last token within the budget, if it has not closed by then.

    tokens: how many a block may hold, counted as the parser counts what stands so far: those of a closing tag count
    until it is whole. What is forced comes on top of them.
    Raises UserError for a budget below 1.
    """
    if tokens < 1:
        raise UserError(f"block budget: got {tokens}, expected at least 1 token")
    return lambda: _BlockBudget(tokenizer, tokens)


def together(*makers: Callable[[], Watch]) -> Callable[[], Watch]:
    """Several watches as one: the earliest cut wins, an end before a forced text, and all are told what was forced."""

    def make() -> Watch:
        watches = [maker() for maker in makers]
        return watches[0] if len(watches) == 1 else _Together(watches)

    return make


class _Together:
    """One row's watch of `together`."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches
        self._due = 0  # tokens that were forced and have not come back yet

    def __call__(self, tokens: np.ndarray) -> Verdict:
        for t in range(len(tokens)):  # one by one, so that no watch is told what another one cuts off
            verdicts = [watch(tokens[t : t + 1]) for watch in self._watches]
            self._due = max(0, self._due - 1)
            end = next((verdict for verdict in verdicts if verdict.done), None)
            force = next((verdict for verdict in verdicts if len(verdict.forced) and not self._due), None)
            if verdict := end or force:  # nothing is forced into a forced text
                self._due = len(verdict.forced)
                return verdict._replace(keep=t + 1)
        return Verdict(len(tokens), _NONE, False)


class _StopStrings:
    """One row's watch of `stop_strings`."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._strings = strings
        self._controls = {tokenizer.control_ids[string] for string in strings if string in tokenizer.control_ids}
        self._reach = max(map(len, strings), default=1) - 1
        self._stream, self._tail = tokenizer.stream(), ""

    def __call__(self, tokens: np.ndarray) -> Verdict:
        parts = [self._stream.feed(token) for token in tokens.tolist()]
        text = self._tail + "".join(parts)
        stops = [text.index(string) + len(string) for string in self._strings if string in text]
        reached = len(self._tail) + np.cumsum([len(part) for part in parts])
        ends = [int(np.searchsorted(reached, stop)) for stop in stops]
        ends += [at for at, token in enumerate(tokens.tolist()) if token in self._controls]
        if ends:
            return Verdict(min(ends) + 1, _NONE, True)
        self._tail = text[max(0, len(text) - self._reach) :]
        return Verdict(len(tokens), _NONE, False)


class _BlockBudget:
    """One row's watch of `block_budget`.

    It forces the closing tag only: to open the next block, in its place and by its name, is the policy's to learn.
    A closing tag that has begun is finished by force. Waiting for the policy to finish it would end in the same text,
    since anything else would have to be cut off; so it would only put the cut off, to before a token.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int) -> None:
        self._tokenizer, self._budget = tokenizer, budget
        self._stream, self._scene = tokenizer.stream(), _Scene()
        self._said = 0
        self._due: list[int] = []  # what was forced and has not come back yet

    def __call__(self, tokens: np.ndarray) -> Verdict:
        for t, token in enumerate(tokens.tolist()):
            if self._hear(token):
                forced = self._tokenizer.encode_inside(self._scene.closing(self._stream.waits))
                self._due = forced.tolist()
                return Verdict(t + 1, forced, False)
        return Verdict(len(tokens), _NONE, False)

    def _hear(self, token: int) -> bool:
        """Take the next token; returns whether the open block has spent its budget with it."""
        self._said += 1
        self._scene.feed(self._stream.feed(token), self._said)
        if self._due:
            if token == self._due.pop(0):
                if not self._due:
                    self._scene.turn = _Turn()  # even where broken bytes swallowed the tag: nothing is forced twice
                return False
            self._due = []  # another watch's text was forced in its place
        turn = self._scene.turn
        return bool(turn.name) and self._said - turn.since >= self._budget


class _Turn(NamedTuple):
    """The fighter whose block is open, "" for none, and how many tokens had been said when its tag was whole."""

    name: str = ""
    since: int = 0


class _Scene:
    """Whose block is open in a growing text, as the parser would say if it ended here; a line is remembered.

    A block that opens anew is counted anew, and one behind `</competition>` is counted too, since the parser can still
    come to count it. A tag in code counts until the code closes; then it is taken back, and its block goes on.
    """

    def __init__(self) -> None:
        self.turn = _Turn()
        self._before = _Turn()  # the turn before the last tag
        self._line: list[str] = []
        self._tail = ""  # the line's end
        self._at_line = _Turn()  # the turn at the beginning of the line
        self._fence, self._at_fence = "", _Turn()  # the open fence's mark, and the turn at the beginning of its line

    def feed(self, text: str, said: int) -> None:
        """Take the text of the next token, the `said`th of the row."""
        if not text:
            return
        first, *others = text.split("\n")
        self._go_on(first, said)
        for piece in others:
            self._end_line()
            self._go_on(piece, said)

    def closing(self, half: bool) -> str:
        """What closes the open block from where the text stands: in the exact layout, a fence that opened in it first.

        half: half a character stands behind the text.
        """
        tag = f"</{self.turn.name}>"
        rest = "" if half else self._rest_of(tag)
        if rest:
            return rest
        line = "".join(self._line)
        fence = fence_behind(line, self._fence)
        inside = self.turn == (self._at_fence if self._fence else self._at_line)
        # Left open, the next fence in another block would close it, and make code of all tags between.
        return ("\n" if line or half else "") + (f"{fence}\n" if fence and inside else "") + tag

    def _go_on(self, piece: str, said: int) -> None:
        known = len(self._tail)
        window = self._tail + piece
        self._line.append(piece)
        if ">" in piece or piece.startswith("`"):
            for tag in scan(window):
                if tag.chars.stop > known and not tag.damage:
                    self._before, self.turn = self.turn, _turn_after(tag, said)
                elif tag.chars.stop == known and tag.damage == "fenced":
                    self.turn = self._before  # it had counted, until this mark
        self._tail = window[-_TAIL:]

    def _end_line(self) -> None:
        fence = fence_behind("".join(self._line), self._fence)
        if fence and not self._fence:
            self._at_fence = self._at_line
        elif self._fence and not fence:
            self.turn = self._at_fence
        self._fence, self._at_line, self._line, self._tail = fence, self.turn, [], ""

    def _rest_of(self, tag: str) -> str:
        """What is missing of a tag that the text ends in; "" when it ends in none, or in one that would not count."""
        size = next((size for size in range(1, len(tag)) if self._tail.endswith(tag[:size])), len(tag))
        whole = self._tail + tag[size:]
        counts = any(found.chars.stop == len(whole) and not found.damage for found in scan(whole + "`"))
        return tag[size:] if counts else ""


def _turn_after(tag: Tag, said: int) -> _Turn:
    return _Turn(tag.name, said) if tag.name in FIGHTERS and not tag.closing else _Turn()
