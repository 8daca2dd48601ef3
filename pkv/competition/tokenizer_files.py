"""What a model directory's files say of its tokenizer: backend, special and stop tokens, chat template. No code."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkv.competition.sentencepiece_model import read_sentencepiece
from pkv.config import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

Settings = dict[str, dict[str, Any]]  # a JSON file's name to what it holds; a missing file holds nothing
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.json"
FAST, _MODEL, _JINJA = "tokenizer.json", "tokenizer.model", "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

TODAY = datetime.date(2024, 7, 26)  # what Llama 3's template writes where it knows no date
_SIGNS = (*"aAbBdHIjmMpSyY", "-d", "-m")
_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('%{sign}', '{TODAY.strftime('%' + sign)}')" for sign in _SIGNS)
    + " }}{% endmacro %}"
)


def read_settings(directory: Path) -> Settings:
    """The JSON files beside a tokenizer. Raises UserError for one that holds no object."""
    return {name: _read_json(directory / name) for name in (CONFIG, GENERATION, TOKENIZER, SPECIAL, ADDED, TEMPLATE)}


def has_only_sentencepiece(directory: Path) -> bool:
    """Whether the tokenizer is a `tokenizer.model` alone. Raises UserError where there is Mistral's own file only."""
    has = {path.name for path in directory.iterdir() if path.is_file()}
    if has.isdisjoint({FAST, _MODEL, "vocab.json"}):
        own = next((name for name in sorted(has) if name == "tekken.json" or name.startswith(f"{_MODEL}.v")), None)
        if own is not None:
            raise UserError(
                f"{directory}: of a tokenizer there is only {own}, Mistral's own form; "
                "add tokenizer.json and tokenizer_config.json from the model's Hugging Face repository"
            )
    return FAST not in has and _MODEL in has


def read_backend(directory: Path, settings: Settings, template: str) -> Backend:
    """The fast tokenizer of `tokenizer.json`, or made of `tokenizer.model`, whose special tokens go into settings.

    template: a user's symbol that the chat template writes is a control token. Raises UserError.
    """
    if not has_only_sentencepiece(directory):
        return _read_fast(directory / FAST)
    added = _added_tokens(settings)
    special, stops = set(_special_texts(settings)), set(_listed_stops(settings))

    def is_control(i: int, text: str) -> bool:
        return text in special or i in stops or (bool(text.strip()) and text in template)

    add_bos = settings[TOKENIZER].get("add_bos_token", True) is not False
    backend, names = read_sentencepiece(directory / _MODEL, added, is_control, add_bos)
    settings[TOKENIZER] = {**names, **settings[TOKENIZER]}
    for name in _NAMED:
        text = special_token(settings, name)
        if text is not None and backend.token_to_id(text) is None:
            backend.add_special_tokens([text])
    return backend


def special_token(settings: Settings, name: str) -> str | None:
    """The text of a token that the files name, such as `eos_token`; None when they don't."""
    for file in (TOKENIZER, SPECIAL):
        token = settings[file].get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            return token
    return None


def named_tokens(settings: Settings) -> dict[str, str]:
    """All tokens that the files name, by their names."""
    found = {name: special_token(settings, name) for name in _NAMED}
    return {name: text for name, text in found.items() if text is not None}


def stop_ids(settings: Settings, end: int | None, vocab_size: int) -> tuple[int, ...]:
    """The tokens at which the model stops: what the first file says that names some, or else the tokenizer's `end`.

    Raises UserError for one that the model's vocabulary doesn't hold.
    """
    found = tuple(dict.fromkeys(_listed_stops(settings))) or (() if end is None else (end,))
    size = table_size(settings) or vocab_size
    outside = [stop for stop in found if not 0 <= stop < size]
    if outside:
        raise UserError(
            f"the stop token {outside[0]} is outside the model's vocabulary of {size}; "
            f"correct eos_token_id in {GENERATION} or {CONFIG}"
        )
    return found


def table_size(settings: Settings) -> int | None:
    """How many tokens the model's embedding holds, which may be fewer or more than the tokenizer; None if not said."""
    return _first(settings[CONFIG], "vocab_size")


def chat_template(directory: Path, settings: Settings) -> str:
    """The chat template of the directory, "" when there is none; of several, the one named `default`."""
    path = directory / _JINJA
    found = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else settings[TOKENIZER].get("chat_template") or settings[TEMPLATE].get("chat_template") or ""
    )
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
    if isinstance(found, Mapping):
        names = ", ".join(map(str, found))
        found = found.get("default") or (next(iter(found.values())) if len(found) == 1 else None)
        if found is None:
            raise UserError(f"{directory}: several chat templates ({names}); expected one that is named 'default'")
    if not isinstance(found, str):
        raise UserError(f"{directory}: the chat template: expected text, got {type(found).__name__}")
    return found


def with_bos(template: str, settings: Settings) -> str:
    """A chat template that begins with the token that the tokenizer's settings want before every text."""
    bos = special_token(settings, "bos_token")
    wanted = settings[TOKENIZER].get("add_bos_token") is True and bos is not None
    lacks = wanted and template and "bos_token" not in template and str(bos) not in template
    return "{{ bos_token }}" + template if lacks else template


def with_fixed_date(template: str) -> str:
    """A chat template that writes `TODAY` for the day's date, here and in an export: no prompt changes overnight."""
    if "strftime_now" not in template or _CLOCK in template:
        return template
    return _CLOCK + template


def _listed_stops(settings: Settings) -> list[int]:
    for name in (GENERATION, CONFIG):
        stops = _first(settings[name], "eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        if stops and all(isinstance(stop, int) for stop in stops):
            return stops
    return []


def _first(config: Mapping[str, Any], key: str) -> Any:
    """A value of a config, or of the text model's config inside it."""
    inner = config.get("text_config")
    found = config.get(key)
    return inner.get(key) if found is None and isinstance(inner, Mapping) else found


def _added_tokens(settings: Settings) -> dict[int, AddedToken]:
    """The tokens that the files put beside a SentencePiece model's or in place of its own, by id."""
    from tokenizers import AddedToken

    special = set(_special_texts(settings))
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    listed = {i: {"content": text} for text, i in settings[ADDED].items()}
    listed |= settings[TOKENIZER].get("added_tokens_decoder") or {}
    found = {}
    for i, token in listed.items():
        if not (isinstance(token, Mapping) and isinstance(token.get("content"), str) and str(i).isdecimal()):
            raise UserError(f"{ADDED} or {TOKENIZER}: expected added tokens as id and content, got {i!r}: {token!r}")
        text = token["content"]
        found[int(i)] = AddedToken(
            text,
            special=bool(token.get("special")) or text in special,
            **{flag: bool(token.get(flag)) for flag in flags},
        )
    return found


def _special_texts(settings: Settings) -> Iterator[str]:
    """The texts that the files call special tokens."""
    yield from named_tokens(settings).values()
    for file in (TOKENIZER, SPECIAL):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = settings[file].get(key) or []
            for token in listed.values() if isinstance(listed, Mapping) else listed:
                text = token.get("content") if isinstance(token, Mapping) else token
                if isinstance(text, str):
                    yield text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(read).__name__}")
    return read


def _read_fast(path: Path) -> Backend:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"{path}: not found; expected the fast tokenizer's file in the model directory")
    raw = json.dumps(_read_json(path))
    try:
        return Tokenizer.from_str(raw)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:160]}") from error
