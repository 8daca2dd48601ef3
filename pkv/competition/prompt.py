"""From a question to the model's prompt tokens; the system prompts are the files in `prompts/`, and nowhere else."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pkv.competition.tags import scan
from pkv.config import UserError

if TYPE_CHECKING:
    from pkv.competition.tokenizer import Tokenizer

_PROMPTS = Path(__file__).parent / "prompts"
_VERSION = re.compile(r"# pkv prompt, version [^\n]*\n")
_INERT = str.maketrans("<>", "‹›")


def system_prompt(name_or_path: str) -> str:
    """The text of a system prompt: one that pkv ships, by its name, or any text file, by its path.

    The version comment in its first line is left out. Raises UserError when there is no such text.
    """
    shipped = {file.stem: file for file in sorted(_PROMPTS.glob("*.txt"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(shipped)}, or a path to a text file"
        )
        raise UserError(f"system prompt {name_or_path!r} not found; {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"system prompt {path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    text = _VERSION.sub("", text, count=1) if _VERSION.match(text) else text
    if not text.strip():
        raise UserError(f"system prompt {path}: the file is empty; write the prompt into it or use 'competition'")
    return text.strip()


def neutralise(question: str) -> str:
    """A question whose construct tags are shown but inert: `<pirate>` becomes `‹pirate›`."""
    pieces, place = [], 0
    for tag in scan(question, most=None):
        start, stop = tag.chars
        pieces += [question[place:start], question[start:stop].translate(_INERT)]
        place = stop
    return "".join([*pieces, question[place:]])


def render(tokenizer: Tokenizer, question: str, system: str) -> np.ndarray:
    """The prompt of a question, int32 [T]: the model's chat template with the system prompt, ready for the response."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": neutralise(question)}]
    return tokenizer.chat(messages)
