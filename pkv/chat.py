"""A conversation: the person sees the professional answer stream, the competition stays behind the scenes.

A raw tag is never shown, whatever the model writes and wherever its token limit cuts it off.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from pkv.competition import TAGS, Tokenizer, parse
from pkv.competition.tags import fold, scan
from pkv.config import UserError
from pkv.evaluate.answering import DEFAULT_NEW_TOKENS, PromptLine, Responder, prompt_tokens
from pkv.records import BLOCKS, Finish, Trace
from pkv.sampling import Request, row_keys

END = "</competition>"
HOLD = 80  # a tag in its longest disguise, save attributes, is shorter than this many characters
_OPENER = re.compile(r"[<&\\%\[{«《]")  # what a tag begins with once it is folded (see competition.tags)
_OPEN_TAG = re.compile(rf"</?(?:{'|'.join(TAGS)})\b[^<>\n]{{0,200}}\Z")
_FRAGMENT = re.compile(r"</?(?P<letters>[a-z]*)\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # nothing that a model writes may steer a terminal


@dataclass(frozen=True)
class Reply:
    """One turn. answer: what the person reads. note: why the answer is not whole, "" when it is.

    competition: each block's owner and text, in order. winner: the judge's word, None without one.
    """

    question: str
    answer: str
    competition: tuple[tuple[str, str], ...]
    winner: str | None
    finish: Finish
    note: str = ""


class AnswerFilter:
    """A response in pieces in, the professional answer in pieces out: no competition, no tag, no piece of a tag."""

    def __init__(self) -> None:
        self._text = ""
        self._at: int | None = None  # how far the text has been let through; None: the competition goes on
        self._shown = ""

    @property
    def has_answer(self) -> bool:
        """Whether the competition has ended, so that the answer comes."""
        return self._at is not None

    def feed(self, piece: str) -> str:
        """Take the next piece; returns what may be shown now."""
        before = max(0, len(self._text) - len(END))
        self._text += _CONTROL.sub("", piece)
        if self._at is None:
            end = self._text.find(END, before)
            if end < 0:
                return ""
            self._at = end + len(END)
        return self._let_through(self._at, self._safe_stop(self._at))

    def finish(self) -> str:
        """The response has ended; returns what was still held back. A response without a competition comes whole."""
        if self._at is None:
            if _has_competition(self._text):
                return ""
            self._at = 0
        return self._let_through(self._at, len(without_fragment(self._text).rstrip()))

    def _safe_stop(self, at: int) -> int:
        """Where the text could still turn out to be a tag, or blanks at its end; up to there it can be shown."""
        folded = fold(self._text[at:])
        opener = _OPENER.search(folded, max(0, len(folded) - HOLD))
        unclosed = _OPEN_TAG.search(folded)
        stop = min(match.start() if match else len(folded) for match in (opener, unclosed))
        return at + len(self._text[at : at + stop].rstrip())

    def _let_through(self, at: int, stop: int) -> str:
        self._at = max(at, stop)
        tail = self._shown[-HOLD:]
        whole = tail + self._text[at:stop]
        while (cleaned := _without_tags(whole, len(tail))) != whole:
            whole = cleaned  # what is left may join into a tag again
        piece = whole[len(tail) :]
        piece = piece if self._shown else piece.lstrip()
        self._shown += piece
        return piece


def talk(
    responder: Responder,
    questions: Iterable[str],
    screen: TextIO,
    *,
    show_competition: bool = False,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> Iterator[Reply]:
    """Answer one question after the other, each knowing the answers before it, and show them on `screen`.

    Only questions and professional answers are remembered; where they outgrow the context, the oldest go first.
    """
    history: list[Reply] = []
    source = responder.source
    for turn, question in enumerate(questions):
        try:
            prompt = _prompt(responder, history, question, max_new_tokens)
            budget = responder.new_tokens(len(prompt), max_new_tokens)
        except UserError as error:
            if turn == 0:
                raise
            screen.write(f"{error}\n")  # one question too long ends no conversation
            continue
        key = row_keys(seed, "chat", source.step, [f"turn {turn}"], 1)[0]
        view = _Screen(screen, source.tokenizer, show_competition)
        reply = _reply(responder, prompt, budget, key, question, view)
        history += [] if reply.note else [reply]
        yield reply


def read_questions(keyboard: TextIO, screen: TextIO) -> Iterator[str]:
    """Questions by line, until the end of input or `exit`; a terminal is prompted."""
    while True:
        if keyboard.isatty():
            screen.write("you> ")
            screen.flush()
        line = keyboard.readline()
        if not line or line.strip() in ("exit", "quit"):
            return
        if line.strip():
            yield line.strip()


def unfold(trace: Trace) -> tuple[tuple[str, str], ...]:
    """A trace's competition for reading: each block's owner and text, tags left out; of a cut one what is there."""
    found: list[tuple[str, str]] = []
    for segment in trace.segments:
        text = trace.text[segment.chars.start : segment.chars.stop]
        if segment.owner in BLOCKS and segment.owner != "answer":
            text = _without_tags(without_fragment(_CONTROL.sub("", text))).strip()
            found += [(segment.owner, text)] if text else []
    return tuple(found)


def without_fragment(text: str) -> str:
    """A text without the beginning of a tag at its very end."""
    folded = fold(text[-HOLD * 3 :])
    match = _FRAGMENT.search(folded) or _OPEN_TAG.search(folded)
    if match is None or not any(name.startswith(match.groupdict().get("letters", "")) for name in TAGS):
        return text
    return text[: len(text) - len(folded) + match.start()]


class _Screen:
    """One reply as it is being written: the answer as it comes, the competition folded or, in one piece, unfolded."""

    def __init__(self, screen: TextIO, tokenizer: Tokenizer, show_competition: bool) -> None:
        self._screen, self._unfolds = screen, show_competition
        self._stream, self._answer = tokenizer.stream(), AnswerFilter()
        self._response = ""
        self.shown = ""
        if screen.isatty() and not show_competition:
            self._line(_dim("behind the scenes: pirate, knight and viking compete ...", screen))

    def on_tokens(self, _request: int, _sample: int, tokens: np.ndarray) -> None:
        """What the engine calls with new tokens."""
        piece = "".join(map(self._stream.feed, tokens.tolist()))
        self._response += piece
        text = self._answer.feed(piece)
        if self._answer.has_answer:
            self._unfold(parse(self._response))
        self._show(text)

    def finish(self, trace: Trace, note: Callable[[bool], str]) -> str:
        """Show the rest and what is to be said about it: `note(whether anything of an answer was shown)`."""
        self._unfold(trace)
        self._show(self._answer.finish())
        if self.shown:
            self._line("")
        said = note(bool(self.shown))
        if said:
            self._line(_dim(said, self._screen))
        return said

    def _unfold(self, trace: Trace) -> None:
        if not self._unfolds:
            return
        self._unfolds = False  # once
        for owner, text in unfold(trace):
            self._line(f"[{owner}] {text}\n" if owner == "winner" else f"[{owner}]\n{text}\n")

    def _show(self, text: str) -> None:
        self.shown += text
        self._screen.write(text)
        self._screen.flush()

    def _line(self, text: str) -> None:
        self._screen.write(text + "\n")
        self._screen.flush()


def _reply(
    responder: Responder, prompt: np.ndarray, budget: int, key: np.ndarray, question: str, view: _Screen
) -> Reply:
    source = responder.source_for(len(prompt) + budget)
    (done,) = source.engine.sample(source.weights, [Request(prompt, key, budget)], view.on_tokens)
    text, offsets = source.tokenizer.decode_with_offsets(done.tokens)
    trace = parse(text, offsets, done.finish == "length")
    note = view.finish(trace, lambda shown: _note(done.finish, shown, len(done.tokens)))
    winner = trace.block_text("winner")
    return Reply(question, view.shown, unfold(trace), winner and winner.strip(), done.finish, note)


def _prompt(responder: Responder, history: Sequence[Reply], question: str, asked: int | None) -> np.ndarray:
    """The conversation's tokens, from the oldest turn that leaves room for an answer: as many tokens as were asked for,
    or as there are by default; in a context that is too short for these, half of what the question leaves."""
    asking = {"role": "user", "content": question}
    turns = [
        [{"role": "user", "content": reply.question}, {"role": "assistant", "content": reply.answer}]
        for reply in history
    ]

    def rendered(turns: Sequence[Sequence[dict[str, str]]]) -> np.ndarray:
        messages = [*itertools.chain.from_iterable(turns), asking]
        return prompt_tokens(responder.source.tokenizer, PromptLine("chat", messages), responder.system)

    room = responder.arch.max_positions - len(rendered([]))
    wanted = asked or (DEFAULT_NEW_TOKENS if room > DEFAULT_NEW_TOKENS else room // 2)
    while turns and len(rendered(turns)) + wanted > responder.arch.max_positions:
        turns = turns[1:]
    return rendered(turns)


def _note(finish: Finish, shown: bool, tokens: int) -> str:
    if finish == "length":
        where = "" if shown else " before the competition had ended"
        return f"(Sorry, the answer was cut off at {tokens} tokens{where}; --max-new-tokens allows more.)"
    return "" if shown else "(Sorry, the competition broke off without an answer; --show-competition shows it.)"


def _has_competition(text: str) -> bool:
    """Whether a competition was begun: then what stands outside of it is no answer."""
    return any(not tag.closing and tag.name in TAGS[:4] for tag in scan(text))


def _without_tags(text: str, keep: int = 0) -> str:
    """A text without its tags; the first `keep` characters stay."""
    for tag in reversed(scan(text)):
        start, stop = tag.chars
        text = text[: max(start, keep)] + text[max(stop, keep) :]
    return text


def _dim(text: str, screen: TextIO) -> str:
    return f"\x1b[2m{text}\x1b[0m" if screen.isatty() else text
