"""A model that answers prompts of any kind, unscored: what `pkv sample` and the chat stand on."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pkv.competition import Tokenizer, render
from pkv.competition.prompt import neutralise
from pkv.compiling import keep_compiled
from pkv.config import SamplingConfig, UserError, describe, half_character, parse_config
from pkv.evaluate.groups import Source
from pkv.evaluate.policy import load_policy, sampling_mesh, usual_dtype
from pkv.model import Arch
from pkv.sampling import Engine, Request, compile_ahead, row_keys

DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Responder:
    """A model ready to be asked: its source of rollouts, its system prompt, and how long a context it holds.

    trained_rows: see `Policy`. new_engine: an engine for the architecture as another context makes it.
    """

    source: Source
    arch: Arch
    system: str
    trained_rows: int = 0
    new_engine: Callable[[Arch], Engine] | None = None

    def source_for(self, length: int) -> Source:
        """The source for rows of up to `length` tokens, prompts included: longrope turns short ones differently."""
        arch = self.arch.for_context(max(length, self.trained_rows))
        if arch == self.arch or self.new_engine is None:
            return self.source
        return replace(self.source, engine=self.new_engine(arch))

    def new_tokens(self, prompt_tokens: int, asked: int | None = None) -> int:
        """How many tokens may follow a prompt: `asked`, or 1024 and what there is room for. Raises UserError."""
        room = self.arch.max_positions - prompt_tokens
        if prompt_tokens < 1 or room < 1:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens; expected 1 to {self.arch.max_positions - 1}: "
                "change the question or the system prompt"
            )
        if asked is None:
            return min(DEFAULT_NEW_TOKENS, room)
        if not 1 <= asked <= room:
            raise UserError(
                f"--max-new-tokens {asked}: expected 1 to {room}; the model holds {self.arch.max_positions} positions, "
                f"and a prompt takes {prompt_tokens}"
            )
        return asked


@dataclass(frozen=True)
class PromptLine:
    """One prompt to answer: a question, messages (`role`, `content`), or with `raw` a text used as it stands."""

    id: str | int
    prompt: str | list[dict[str, str]]
    raw: bool = False


def open_model(model: str, sampling: SamplingConfig, system: str | None = None) -> Responder:
    """Load a MODEL for sampling, weights and rows spread over all devices, in bfloat16, but float32 on a CPU.

    Raises UserError.
    """
    keep_compiled()
    mesh, dtype = sampling_mesh(model), usual_dtype()
    policy = load_policy(model, mesh, system=system, dtype=dtype)
    new_engine = functools.cache(lambda arch: Engine(arch, sampling, policy.tokenizer.stop_ids, mesh, dtype))
    engine = new_engine(policy.arch)
    source = Source(engine, engine.load(policy.params), policy.tokenizer, policy.step, sampling.stop)
    return Responder(source, policy.arch, policy.system, policy.trained_rows, new_engine)


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a file of JSON lines `{"id", "prompt"[, "raw"]}`. Raises UserError with the line's number."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of JSON lines") from error
    found: dict[str, PromptLine] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object in UTF-8: {error}") from error
        prompt = read_prompt(record, where)
        if str(prompt.id) in found:
            raise UserError(f"{where}: the id {prompt.id!r} is used twice; the samples could not be told apart")
        found[str(prompt.id)] = prompt
    if not found:
        raise UserError(f"{path}: holds no prompts")
    return list(found.values())


def read_prompt(record: Any, where: str) -> PromptLine:
    """A checked `PromptLine` from a record's plain values. Raises UserError that begins with `where`."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected an object, got {describe(record)}")
    for key in ("id", "prompt"):
        if key not in record:
            raise UserError(f"{where}: {key!r} is missing; a line needs id and prompt")
    name, prompt, raw = record["id"], record["prompt"], record.get("raw", False)
    if not isinstance(name, str | int) or isinstance(name, bool) or half_character(str(name)):
        raise UserError(f"{where}: 'id': expected text or a whole number, got {describe(name)}")
    if not isinstance(raw, bool):
        raise UserError(f"{where}: 'raw': expected true or false, got {describe(raw)}")
    if raw and not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt': a raw prompt must be text, got {describe(prompt)}")
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise UserError(f"{where}: 'prompt': expected text, or messages with role and content; got {describe(prompt)}")
    _refuse_halves(prompt, f"{where}: 'prompt'")
    return PromptLine(name, prompt if isinstance(prompt, str) else [dict(message) for message in prompt], raw)


def prompt_tokens(tokenizer: Tokenizer, line: PromptLine, system: str) -> np.ndarray:
    """A prompt's token ids, int32 [T]; messages without a system message get `system`. Raises UserError."""
    _refuse_halves(line.prompt, "prompt")
    if isinstance(line.prompt, str):
        return tokenizer.encode(line.prompt) if line.raw else render(tokenizer, line.prompt, system)
    messages = [
        {**message, "content": neutralise(message["content"])} if message["role"] == "user" else message
        for message in line.prompt
    ]
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.chat(messages)


def sample(
    model: str,
    prompts: Iterable[PromptLine | Mapping[str, Any]],
    *,
    samples: int = 1,
    max_new_tokens: int | None = None,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    system: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer every prompt `samples` times; each answer is yielded when it ends, as what `pkv sample` writes a line.

    prompts: `{"id", "prompt"[, "raw"]}`. Yields `{"id", "sample", "tokens", "text", "logprobs", "finish"}`; the draws
    depend on seed, policy step, id and sample only. Raises UserError.
    """
    lines = [
        line if isinstance(line, PromptLine) else read_prompt(line, f"prompt {number}")
        for number, line in enumerate(prompts, 1)
    ]
    parse_config({"seed": int(seed)})  # JAX would take its last 32 bits for it
    if samples < 1:
        raise UserError(f"--samples {samples}: expected at least 1")
    if not lines:
        return
    responder = open_model(model, sampling or SamplingConfig(), system)
    keys = row_keys(seed, "sample", responder.source.step, [str(line.id) for line in lines], samples)
    requests = [_request(responder, line, key, max_new_tokens) for line, key in zip(lines, keys, strict=True)]
    source = responder.source_for(max(len(request.prompt) + request.max_new_tokens for request in requests))
    compile_ahead(source.engine, source.weights, requests)
    for done in source.engine.sample(source.weights, requests):
        yield {
            "id": lines[done.request].id,
            "sample": done.sample,
            "tokens": done.tokens.tolist(),
            "text": source.tokenizer.decode(done.tokens),
            "logprobs": done.logprobs.tolist(),
            "finish": done.finish,
        }


def _request(responder: Responder, line: PromptLine, keys: np.ndarray, asked: int | None) -> Request:
    try:
        tokens = prompt_tokens(responder.source.tokenizer, line, responder.system)
        return Request(tokens, keys, responder.new_tokens(len(tokens), asked), responder.source.watch())
    except UserError as error:
        raise UserError(f"prompt {line.id!r}: {error}") from error


def _refuse_halves(prompt: str | list[dict[str, str]], where: str) -> None:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if half := half_character("\n".join(texts)):
        raise UserError(f"{where}: got {half!r}, half of a character and no text; leave it out")


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
    )
