"""Text to tokens and back: the only door to tokenizers. What people write can never become a control token here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkv.competition.chat_text import RefusalError, control_runs, render_chat, with_system_prompt
from pkv.competition.token_bytes import TextStream, TokenBytes
from pkv.competition.tokenizer_files import (
    FAST,
    GENERATION,
    TOKENIZER,
    Settings,
    chat_template,
    has_only_sentencepiece,
    named_tokens,
    read_backend,
    read_settings,
    special_token,
    stop_ids,
    table_size,
    with_bos,
    with_fixed_date,
)
from pkv.config import UserError
from pkv.hub import find_checkpoint

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NEVER = -1e6  # a Unigram score that no text takes


class Tokenizer:
    """A model's tokenizer. Build it with `Tokenizer.load`."""

    def __init__(self, backend: Backend, settings: Settings, chat_form: Any = None) -> None:
        """settings: what the directory's JSON files say. chat_form: transformers' tokenizer, or None when light."""
        self._backend = backend
        self._chat_form = chat_form
        self._control = _control_tokens(backend)
        self._plain = _without_control(backend, keep=("always", "first"))
        self._bytes = TokenBytes(backend)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        blanks = backend.get_added_tokens_decoder().keys() - self._control.keys()
        # No text becomes an id from here on; a template may write one.
        self.text_size: int = max(*backend.get_vocab(with_added_tokens=False).values(), *blanks) + 1
        self._table = table_size(settings) or self.vocab_size
        self.stop_ids: tuple[int, ...] = stop_ids(settings, self._id_of(settings, "eos_token"), self.vocab_size)
        pad = self._id_of(settings, "pad_token")
        if pad is None or pad >= self._table:
            pad = self.stop_ids[0] if self.stop_ids else 0
        self.pad_id: int = pad

    @property
    def control_ids(self) -> dict[str, int]:
        """The ids of control tokens by how they are spelled; in no text that `decode` or a stream gives."""
        return {token.content: number for number, token in self._control.items()}

    @classmethod
    def load(cls, path_or_hub_id: str | Path, light: bool = False) -> Tokenizer:
        """Open the tokenizer of a Hugging Face directory or hub id; no code of the repository is ever run.

        light: read `tokenizer.json` or `tokenizer.model` only, without transformers; then there is no `chat` and no
        `save`. Raises UserError when there is none, or none that can be used.
        """
        directory = find_checkpoint(path_or_hub_id)
        settings = read_settings(directory)
        template = chat_template(directory, settings)
        if light:
            return cls(read_backend(directory, settings, template), settings)
        if has_only_sentencepiece(directory):
            chat_form = _wrap(read_backend(directory, settings, template), settings)
        else:
            chat_form = _read_with_transformers(directory, path_or_hub_id)
        chat_form.chat_template = with_fixed_date(with_bos(template, settings)) or None
        return cls(chat_form.backend_tokenizer, settings, chat_form)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [T]; a control token's spelling in it becomes ordinary tokens."""
        return self._within_table(self._encode(text, self._plain))

    def encode_inside(self, text: str) -> np.ndarray:
        """Token ids of a text that goes on behind other text, int32 [T]: no blank is put before it."""
        return self._within_table(self._encode(text, self._bare))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_with_offsets(self, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray]:
        """The text of token ids and int32 [T+1]: the character where each token starts, then len(text); linear.

        A special token has no characters. A character that several tokens share belongs to the one that completes it.
        """
        return self._bytes.text_and_starts([int(i) for i in ids])

    def stream(self) -> TextStream:
        """What turns one row's tokens into text as they come, special tokens left out."""
        return self._bytes.stream()

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> np.ndarray:
        """Messages (`role`, `content`) in the model's chat template, int32 [T].

        Only the template's own text makes control tokens. A template without a system role gets the system's text at
        the head of the first message. Raises UserError when there is no template, or it refuses the messages.
        """
        if self._chat_form is None or not self._chat_form.chat_template:
            why = "was opened light" if self._chat_form is None else "has no chat template"
            raise UserError(
                f"this tokenizer {why}, so it cannot hold a chat; use a model directory with a chat template"
            )
        roles = [message["role"] for message in messages]
        unknown = [role for role in roles if role not in _ROLES]
        if unknown:  # a template writes a role as it stands, so it could spell a control token
            raise UserError(f"the role {unknown[0]!r} of a message is unknown; expected one of {', '.join(_ROLES)}")
        try:
            text, marks = render_chat(self._chat_form, messages, add_generation_prompt)
        except RefusalError as refusal:
            if len(messages) > 1 and roles[0] == "system":
                joined = "\n\n".join(message["content"] for message in messages[:2])
                return self.chat([{**messages[1], "content": joined}, *messages[2:]], add_generation_prompt)
            raise UserError(f"the chat template refuses the roles {', '.join(roles)}: {refusal}") from refusal
        ids: list[int] = []
        control = {token.content: (i, token) for i, token in self._control.items()}
        for run in control_runs(text, marks, control):
            ids += [run] if isinstance(run, int) else self._encode(run, self._inner if ids else self._plain)
        return self._within_table(ids)

    def save(self, directory: str | Path, chat_template: str | None = None) -> None:
        """Write the tokenizer into a directory with its stop tokens, and another chat template if one is given."""
        if self._chat_form is None:
            raise UserError("a tokenizer that was opened light cannot be saved; open it with Tokenizer.load(path)")
        own = self._chat_form.chat_template
        try:
            self._chat_form.chat_template = own if chat_template is None else chat_template or None
            self._chat_form.save_pretrained(str(directory))
        finally:
            self._chat_form.chat_template = own
        _name_class(Path(directory) / TOKENIZER)
        (Path(directory) / GENERATION).write_text(json.dumps(self.ends, indent=2) + "\n", encoding="utf-8")

    @property
    def ends(self) -> dict[str, Any]:
        """Stop and pad tokens in the words of generation_config.json."""
        return {"eos_token_id": list(self.stop_ids) or None, "pad_token_id": self.pad_id}

    @cached_property
    def text_ids(self) -> np.ndarray:
        """The ids of ordinary text in order, int32: no control token, and none that the model has no embedding for."""
        ids = set(self._backend.get_vocab(with_added_tokens=True).values()) - self._control.keys()
        return np.asarray(sorted(i for i in ids if i < self._table), np.int32)

    @property
    def chat_template(self) -> str:
        """The model's chat template, "" when it has none."""
        return (self._chat_form.chat_template or "") if self._chat_form is not None else ""

    @cached_property
    def turn_end(self) -> int:
        """The stop token that the chat template ends an answer with; the first one, where it ends it with none.

        Raises UserError when there is no stop token.
        """
        if not self.stop_ids:
            raise UserError("the model names no stop token; add eos_token_id to its generation_config.json")
        one, other = ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in "78")
        pairs = zip(reversed(self.chat(one, False)), reversed(self.chat(other, False)), strict=False)
        behind = [int(a) for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return next((i for i in reversed(behind) if i in self.stop_ids), self.stop_ids[0])

    def template_with(self, system: str) -> str:
        """The chat template with `system` in it for messages that bring no system message; "" without a template."""
        template = self.chat_template
        if not template or any(template.startswith(with_system_prompt("", system, role)) for role in (True, False)):
            return template  # of a model that was exported before
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        try:
            render_chat(self._chat_form, asked, generate=True)
        except RefusalError:
            return with_system_prompt(template, system, has_role=False)
        return with_system_prompt(template, system)

    def _within_table(self, ids: list[int]) -> np.ndarray:
        """Ids as an array, int32 [T]. Raises UserError for one that the model has no embedding for."""
        if ids and max(ids) >= self._table:
            raise UserError(
                f"the token {self._backend.id_to_token(max(ids))!r} has the id {max(ids)}, but the model's vocabulary "
                f"is {self._table}; leave it out of the chat template, or use a model that was trained with it"
            )
        return np.asarray(ids, np.int32)

    def _encode(self, text: str, plain: Backend) -> list[int]:
        ids = plain.encode(text, add_special_tokens=False).ids
        if self._control.keys().isdisjoint(ids):
            return ids
        # A model can hold a control token as a piece in a way that was not foreseen: break the text up.
        pieces = [plain.encode(text[0], add_special_tokens=False).ids]
        pieces += [self._bare.encode(char, add_special_tokens=False).ids for char in text[1:]]
        return [i for piece in pieces for i in piece]

    @cached_property
    def _inner(self) -> Backend:
        """What reads a run of text that stands behind a control token."""
        return _without_control(self._backend, keep=("always",)) if '"first"' in _steps(self._backend) else self._plain

    @cached_property
    def _bare(self) -> Backend:
        """What reads text with no blank put before it."""
        return _without_control(self._backend, keep=())

    def _id_of(self, settings: Settings, key: str) -> int | None:
        token = special_token(settings, key)
        if token is None and self._chat_form is not None:
            token = getattr(self._chat_form, key)
        return None if token is None else self._backend.token_to_id(str(token))


def _read_with_transformers(directory: Path, name: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        chat_form = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises nothing narrower for a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        file = directory / FAST
        raise UserError(
            f"{file if file.is_file() else name}: its tokenizer cannot be read: {reason}; fetch the model's files again"
        ) from error
    if getattr(chat_form, "backend_tokenizer", None) is None:
        raise UserError(f"{name}: its tokenizer has no fast form; add a tokenizer.json to the directory")
    return chat_form


def _wrap(backend: Backend, settings: Settings) -> Any:
    """transformers' tokenizer around a backend of ours."""
    from transformers import PreTrainedTokenizerFast

    said = settings[TOKENIZER]
    kept = {key: said[key] for key in ("model_max_length", "padding_side", "truncation_side") if key in said}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named_tokens(settings), **kept
    )


def _name_class(config: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    said = json.loads(config.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _control_tokens(backend: Backend) -> dict[int, AddedToken]:
    """Added tokens that stand for themselves, by id; runs of blanks are text."""
    return {i: token for i, token in backend.get_added_tokens_decoder().items() if token.content.strip()}


def _without_control(backend: Backend, keep: Sequence[str]) -> Backend:
    """The same tokenizer, but reading every control token's spelling as ordinary text.

    keep: the schemes by which a blank may be put before a text: "always", "first" (of the first run only).
    """
    from tokenizers import Tokenizer

    raw = json.loads(backend.to_str())
    control = {token["content"] for token in raw["added_tokens"] if token["content"].strip()}
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    model = raw["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[text, _NEVER if text in control else score] for text, score in model["vocab"]]
    elif model["type"] == "BPE":
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in control]
    raw["normalizer"], raw["pre_tokenizer"] = (_prefixes(raw[step], keep) for step in ("normalizer", "pre_tokenizer"))
    plain = Tokenizer.from_str(json.dumps(raw))
    plain.encode_special_tokens = True
    return plain


def _prefixes(step: Any, keep: Sequence[str]) -> Any:
    """A step of a tokenizer file with only these schemes of putting a blank before a text left in it."""
    if not isinstance(step, Mapping):
        return step
    step = dict(step)
    if step.get("prepend_scheme", "always") not in keep and "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "always" not in keep:
        if step["type"] == "Prepend":
            return {"type": "Sequence", "normalizers": []}
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
    for inner in ("normalizers", "pretokenizers"):
        if inner in step:
            step[inner] = [_prefixes(each, keep) for each in step[inner]]
    return step


def _steps(backend: Backend) -> str:
    return json.dumps(json.loads(backend.to_str())["pre_tokenizer"])
