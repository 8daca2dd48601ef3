"""What each token adds to the text, in bytes, so that a text's characters can be given back to their tokens."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from pkv.config import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# SentencePiece's decoder as tokenizer files write it: these steps in this order, all but the first optional.
_STEPS = re.compile("Replace( ByteFallback)?( Fuse( Strip)?)?")


class TokenBytes:
    """The text of tokens and where each token stands in it, equal to the tokenizer's own decoding."""

    def __init__(self, backend: Backend) -> None:
        """Raises UserError for a tokenizer that is neither byte-level nor SentencePiece's kind."""
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            to_bytes = _byte_level()
        elif kinds == ["Metaspace"] or _is_sentencepiece(steps):
            to_bytes = _byte_fallback if "ByteFallback" in kinds else _blanks
        else:
            raise UserError(
                f"this tokenizer decodes by {', '.join(kinds) or 'nothing'}; pkv reads byte-level tokenizers "
                "and those of SentencePiece's kind"
            )
        added = backend.get_added_tokens_decoder()
        vocabulary = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
        vocabulary |= {i: backend.id_to_token(i) or "" for i in added}  # a normalised one is shown with its blank
        shown = {i: token for i, token in vocabulary.items() if not (i in added and added[i].special)}
        self._pieces = {i: to_bytes(token) for i, token in shown.items()}
        self._byte_ids = {i for i, token in shown.items() if "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token)}
        self._strips = sum(step["start"] for step in steps if step["type"] == "Strip")
        # Metaspace shows no blank at all in the very first token
        bares = kinds == ["Metaspace"] and steps[0]["prepend_scheme"] != "never"
        self._first_pieces = {i: token.replace("▁", "").encode() for i, token in shown.items()} if bares else {}

    def text_and_starts(self, ids: Sequence[int]) -> tuple[str, np.ndarray]:
        """The text of token ids, and int32 [T+1]: the character where each token starts, then len(text); linear.

        Special tokens and ids beyond the vocabulary have no characters.
        """
        parts = [self._pieces.get(i, b"") for i in ids]
        if self._byte_ids:
            _mend_byte_runs(parts, [i in self._byte_ids for i in ids])
        first = next((t for t, i in enumerate(ids) if i in self._first_pieces), None)
        if first is not None:
            parts[first] = self._first_pieces[ids[first]]
        if self._strips:
            _strip(parts, self._strips)
        text, char_stops = _decode_utf8(b"".join(parts))
        token_starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return text, np.searchsorted(char_stops, token_starts, side="right").astype(np.int32)

    def stream(self) -> TextStream:
        """The text of one row, token by token."""
        return TextStream(self._pieces, self._byte_ids, self._first_pieces, self._strips)


class TextStream:
    """One row's text as its tokens come; half a character waits for its other half.

    No character is taken back: of byte tokens that decode to U+FFFD because their run breaks off later, those that
    were whole characters stay.
    """

    def __init__(
        self, pieces: Mapping[int, bytes], byte_ids: Set[int], first_pieces: Mapping[int, bytes], blanks: int
    ) -> None:
        """blanks: how many are dropped from the beginning of the text."""
        self._pieces, self._byte_ids, self._first_pieces, self._blanks = pieces, byte_ids, first_pieces, blanks
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict" if byte_ids else "replace")
        self._broken = False  # the run of byte tokens is no text

    @property
    def waits(self) -> bool:
        """Whether half a character waits."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token: int) -> str:
        """Take the next token; returns the characters that it completes."""
        part = self._pieces.get(token, b"")
        if token in self._first_pieces:
            part, self._first_pieces = self._first_pieces[token], {}
        if not self._byte_ids:
            text = self._decoder.decode(part)
        else:
            text = self._add_byte(part) if token in self._byte_ids else self._end_bytes(part)
        return self._without_blanks(text) if self._blanks else text

    def _add_byte(self, byte: bytes) -> str:
        if not self._broken:
            try:
                return self._decoder.decode(byte)
            except UnicodeDecodeError:
                self._broken = True
                self._decoder.reset()
        return "\ufffd"

    def _end_bytes(self, part: bytes) -> str:
        if not part:
            return ""
        broken = "\ufffd" if self.waits else ""
        self._broken = False
        self._decoder.reset()
        return broken + part.decode()

    def _without_blanks(self, text: str) -> str:
        kept = text[min(self._blanks, len(text) - len(text.lstrip(" "))) :]
        self._blanks = 0 if kept else self._blanks - len(text)
        return kept


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether these decoder steps turn `▁` into a blank, and at most join bytes and drop the first blanks."""
    if not _STEPS.fullmatch(" ".join(step["type"] for step in steps)):
        return False
    strips = [step for step in steps if step["type"] == "Strip"]
    blank = steps[0]["pattern"] == {"String": "▁"} and steps[0]["content"] == " "
    return blank and all(step["content"] == " " and step["stop"] == 0 for step in strips)


def _byte_level() -> Callable[[str], bytes]:
    """By the byte alphabet of GPT-2; a token with another character in it is an added one, and plain text."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in shown}
    byte_of |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in shown)}

    def to_bytes(token: str) -> bytes:
        known = all(char in byte_of for char in token)
        return bytes(byte_of[char] for char in token) if known else token.encode()

    return to_bytes


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _blanks(token)


def _blanks(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _strip(parts: list[bytes], blanks: int) -> None:
    """Drop up to so many blanks from the beginning of the text."""
    for t, part in enumerate(parts):
        drop = min(blanks, len(part) - len(part.lstrip(b" ")))
        parts[t], blanks = part[drop:], blanks - drop
        if parts[t]:
            return


def _mend_byte_runs(parts: list[bytes], is_byte: Sequence[bool]) -> None:
    """As SentencePiece decodes: where a run of byte tokens is not valid UTF-8, each of them becomes U+FFFD."""
    run: list[int] = []
    for t in range(len(parts) + 1):
        if t < len(parts) and is_byte[t]:
            run.append(t)
        elif run and (t == len(parts) or parts[t]):
            try:
                b"".join(parts[k] for k in run).decode()
            except UnicodeDecodeError:
                for k in run:
                    parts[k] = "\ufffd".encode()
            run = []


def _decode_utf8(data: bytes) -> tuple[str, np.ndarray]:
    """Text of bytes, broken stretches as U+FFFD, and the byte where each character stops; linear."""
    view, texts, stops, place = memoryview(data), [], [], 0
    while place < len(data):
        try:
            text, size = codecs.utf_8_decode(view[place:], "strict", True)
            broken = 0
        except UnicodeDecodeError as error:
            text, size = codecs.utf_8_decode(view[place : place + error.start], "strict", True)
            broken = error.end - error.start
        lead = np.flatnonzero((np.frombuffer(view[place : place + size], np.uint8) & 0xC0) != 0x80)
        if size:
            stops.append(place + np.append(lead[1:], size))
            texts.append(text)
        place += size + broken
        if broken:
            stops.append(np.array([place]))
            texts.append("\ufffd")
    return "".join(texts), np.concatenate(stops) if stops else np.zeros(0, np.int64)
