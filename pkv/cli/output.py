"""Where results go, and the checks of flags that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from pkv.config import Config, SamplingConfig, UserError, parse_config

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Output:
    """Where a command's results go; with `--json` people's text goes to stderr, so that `results` holds JSON only."""

    results: TextIO
    json: bool

    def say(self, text: str) -> None:
        """Text for people."""
        print(text, file=sys.stderr if self.json else self.results, flush=True)

    def record(self, value: Any) -> None:
        """One line of JSON."""
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=self.results, flush=True)

    def result(self, text: str, value: Any) -> None:
        """A result: as text, or as JSON."""
        if self.json:
            self.record(value)
        else:
            self.say(text)


def sampling_of(
    seed: int, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, stop: Sequence[str] = ()
) -> SamplingConfig:
    """Sampling settings, checked together with the seed of the draws. Raises UserError."""
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": list(stop)}
    return parse_config({"seed": seed, "sampling": asked}).sampling


def at_least(name: str, value: int, least: int = 1) -> None:
    """Raise UserError for a flag below its least value."""
    if value < least:
        raise UserError(f"--{name} {value}: expected at least {least}")


def offsets_of(config: Config | None) -> Callable[[str], np.ndarray] | None:
    """How the tokenizer of the config's model cuts a text, so that lengths are in tokens; None without a model."""
    if config is None or not config.model.path:
        return None
    from pkv.competition import Tokenizer, split_tokens

    tokenizer = Tokenizer.load(config.model.path, light=True)

    def offsets(text: str) -> np.ndarray:
        decoded, found = tokenizer.decode_with_offsets(tokenizer.encode(text))
        # A tokenizer that normalises has not the same characters: there words stand in for its tokens.
        return found if decoded == text else split_tokens(text)

    return offsets
