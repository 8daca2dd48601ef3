"""Text to tokens and back: the only door to tokenizers. What people write can never become a control token here."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkv.config import UserError
from pkv.hub import find_checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen2's pre-tokenizer: words with the blank before them, every digit by itself, runs of signs, runs of blanks.
# Not free to choose: beside a Qwen2 config.json transformers puts it in place of whatever tokenizer.json says.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A model's tokenizer. Build it with `Tokenizer.load`."""

    def __init__(self, backend: Backend, settings: Mapping[str, Any], chat_form: Any = None) -> None:
        """settings: what the directory's JSON files say. chat_form: transformers' tokenizer, or None when light."""
        self._backend = backend
        self._chat_form = chat_form
        self._control = _control_tokens(backend)
        self._plain = _without_control(backend)
        self._pieces = _token_bytes(backend)
        self._byte_run = _byte_fallback_ids(backend)
        self._strips_first_blank = _strips_first_blank(backend)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.stop_ids: tuple[int, ...] = self._find_stop_ids(settings)
        pad = self._id_of(settings, "pad_token")
        self.pad_id: int = pad if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)

    @classmethod
    def load(cls, path_or_hub_id: str | Path, light: bool = False) -> Tokenizer:
        """Open the tokenizer of a Hugging Face directory or hub id; no code of the repository is ever run.

        light: read `tokenizer.json` only, without transformers; then there is no `chat` and no `save`.
        Raises UserError when there is none, or none that can be used.
        """
        directory = find_checkpoint(path_or_hub_id)
        settings: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            settings[name] = _read_json(directory / name)
        if light:
            return cls(_read_backend(directory / "tokenizer.json"), settings)
        from transformers import AutoTokenizer

        try:
            chat_form = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path_or_hub_id}: its tokenizer cannot be read: {reason}") from error
        backend = getattr(chat_form, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{path_or_hub_id}: its tokenizer has no fast form; add a tokenizer.json to the directory")
        return cls(backend, settings, chat_form)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [T]; a control token's spelling in it becomes ordinary tokens."""
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self._control.keys().isdisjoint(ids):  # a Unigram model holds control tokens as pieces: break them up
            ids = [i for char in text for i in self._plain.encode(char, add_special_tokens=False).ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_with_offsets(self, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray]:
        """The text of token ids and int32 [T+1]: the character where each token starts, then len(text); linear.

        A special token has no characters. A character that several tokens share belongs to the one that completes it.
        """
        ids = [int(i) for i in ids]
        parts = [self._pieces.get(i, b"") for i in ids]
        if self._byte_run:
            _mend_byte_runs(parts, [i in self._byte_run for i in ids])
        if self._strips_first_blank:
            first = next((t for t, part in enumerate(parts) if part), None)
            if first is not None:
                parts[first] = parts[first].removeprefix(b" ")
        text, char_stops = _decode_utf8(b"".join(parts))
        token_starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return text, np.searchsorted(char_stops, token_starts, side="right").astype(np.int32)

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
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        text = self._render(messages, marks, add_generation_prompt)
        if text is None and len(messages) > 1 and messages[0]["role"] == "system":
            joined = "\n\n".join(message["content"] for message in messages[:2])
            return self.chat([{**messages[1], "content": joined}, *messages[2:]], add_generation_prompt)
        if text is None:
            raise UserError(f"the chat template refuses the roles {', '.join(m['role'] for m in messages)}")
        ids: list[int] = []
        contents = {mark: message["content"] for mark, message in zip(marks, messages, strict=True)}
        for run in self._runs(text, contents):
            ids += [run] if isinstance(run, int) else self.encode(run).tolist()
        return np.asarray(ids, np.int32)

    def save(self, directory: str | Path, chat_template: str | None = None) -> None:
        """Write the tokenizer into a directory, with another chat template if one is given."""
        if self._chat_form is None:
            raise UserError("a tokenizer that was opened light cannot be saved; open it with Tokenizer.load(path)")
        own = self._chat_form.chat_template
        try:
            self._chat_form.chat_template = own if chat_template is None else chat_template
            self._chat_form.save_pretrained(str(directory))
        finally:
            self._chat_form.chat_template = own

    @property
    def chat_template(self) -> str:
        """The model's chat template, "" when it has none."""
        return (self._chat_form.chat_template or "") if self._chat_form is not None else ""

    def _render(self, messages: Sequence[Mapping[str, str]], marks: Sequence[str], generate: bool) -> str | None:
        """The template's text with a mark for each content; None when the template refuses or leaves one out."""
        from jinja2.exceptions import TemplateError

        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        try:
            text = self._chat_form.apply_chat_template(marked, tokenize=False, add_generation_prompt=generate)
        except TemplateError:
            return None
        return text if all(text.count(mark) == 1 for mark in marks) else None

    def _runs(self, template_text: str, contents: Mapping[str, str]) -> Iterator[str | int]:
        """Control tokens of the template, and the runs of text between them, contents put in.

        Text is encoded in whole runs, so that tokens fall as they do when the model's own tokenizer reads it all.
        """
        by_text = {text: i for i, text in self._control.items()}
        longest_first = sorted(by_text, key=len, reverse=True)
        splitter = re.compile("|".join(map(re.escape, longest_first))) if by_text else None
        run, place = "", 0

        def fill(text: str) -> str:
            return re.sub("\ue000\\d+\ue001", lambda mark: contents[mark[0]], text)

        for control in splitter.finditer(template_text) if splitter else ():
            run = fill(template_text[place : control.start()])
            if run:
                yield run
            yield by_text[control[0]]
            place = control.end()
        run = fill(template_text[place:])
        if run:
            yield run

    def _find_stop_ids(self, settings: Mapping[str, Any]) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            stops = settings[name].get("eos_token_id")
            stops = stops if isinstance(stops, list) else [stops]
            if all(isinstance(stop, int) for stop in stops) and stops:
                return tuple(dict.fromkeys(stops))
        stop = self._id_of(settings, "eos_token")
        return () if stop is None else (stop,)

    def _id_of(self, settings: Mapping[str, Any], key: str) -> int | None:
        token = settings["tokenizer_config.json"].get(key)
        if token is None and self._chat_form is not None:
            token = getattr(self._chat_form, key)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self._backend.token_to_id(str(token))


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | Path) -> None:
    """Train a byte-level BPE tokenizer and write it as a Hugging Face directory (ChatML, every digit a token).

    The construct's tags stay ordinary text. Raises UserError when vocab_size has no room for all bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = [END_OF_TEXT, TURN_START, TURN_END]
    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(
            f"vocab_size: got {vocab_size}, expected at least {least} (every byte and {len(special)} special tokens)"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def with_system_prompt(template: str, system: str) -> str:
    """A chat template in which `system` stands when the messages bring no system message of their own."""
    literal = system.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n")
    message = f'{{"role": "system", "content": "{literal}"}}'
    guard = "not messages or messages[0]['role'] != 'system'"
    return f"{{% if {guard} %}}{{% set messages = [{message}] + messages %}}{{% endif %}}{template}"


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


def _read_backend(path: Path) -> Backend:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"{path}: not found; expected the fast tokenizer's file in the model directory")
    raw = json.dumps(_read_json(path))
    try:
        return Tokenizer.from_str(raw)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:160]}") from error


def _control_tokens(backend: Backend) -> dict[int, str]:
    """Added tokens that stand for themselves, id to spelling; runs of blanks are text."""
    added = backend.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if token.content.strip()}


def _without_control(backend: Backend) -> Backend:
    """The same tokenizer, but reading every control token's spelling as ordinary text."""
    from tokenizers import Tokenizer

    raw = json.loads(backend.to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or bool(token["content"].strip())
    plain = Tokenizer.from_str(json.dumps(raw))
    plain.encode_special_tokens = True
    return plain


def _token_bytes(backend: Backend) -> dict[int, bytes]:
    """What each token adds to the text, as UTF-8 bytes; special tokens are absent.

    Source: the byte alphabet of GPT-2, and SentencePiece's `▁` and `<0x0A>`. Raises UserError for other kinds.
    """
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    added = backend.get_added_tokens_decoder()
    vocabulary = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    if '"ByteLevel"' in decoder:
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of = {chr(b): b for b in shown}
        byte_of |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in shown)}

        def to_bytes(token: str) -> bytes:
            known = all(char in byte_of for char in token)
            return bytes(byte_of[char] for char in token) if known else token.encode()

    elif '"ByteFallback"' in decoder:

        def to_bytes(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    else:
        raise UserError(
            "this tokenizer is neither byte-level nor SentencePiece with byte fallback; pkv reads only these two"
        )
    return {i: to_bytes(token) for i, token in vocabulary.items() if not (i in added and added[i].special)}


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_fallback_ids(backend: Backend) -> frozenset[int]:
    """The ids of SentencePiece's byte tokens; none for a byte-level tokenizer."""
    if '"ByteFallback"' not in json.dumps(json.loads(backend.to_str())["decoder"]):
        return frozenset()
    return frozenset(i for token, i in backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))


def _strips_first_blank(backend: Backend) -> bool:
    """Whether the decoder drops the blank that SentencePiece puts before a text."""
    steps = json.loads(backend.to_str())["decoder"].get("decoders", [])
    return any(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0 for step in steps)


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
