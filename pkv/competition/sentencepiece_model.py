"""A SentencePiece model as a fast tokenizer with the same ids: the `tokenizer.model` of Llama 2, Mistral and Gemma.

Own reading, because transformers' ignores what the model says of blanks: the one before a text, and those removed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkv.config import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # a piece's type in the file
UNIGRAM, BPE = 1, 2  # a model's type in the file
_NEVER = -1e6  # the score of a piece that no text may become
_SYMBOL = 0.125  # Unigram's score of a user's symbol, by byte: found by trial; eighths add up without rounding
_MANY = 1 << 16  # more blanks than a text begins with


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


def read_sentencepiece(
    path: Path, added: Mapping[int, AddedToken], is_control: Callable[[int, str], bool], add_bos: bool
) -> tuple[Backend, dict[str, str]]:
    """The tokenizer of a SentencePiece file, and its special tokens by name (`bos_token`, ...).

    added: what the directory adds or renames, by id. is_control: is a user's symbol (id, text) a control token?
    Two rarities have other ids: Unigram's pieces of equal score may change places (SentencePiece adds in 32 bits),
    and a normaliser of its own (nmt_nfkc) reads joined emoji otherwise. Raises UserError for a file of another kind.
    """
    from tokenizers import AddedToken, processors

    proto = _parse(path)
    pieces = [_Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    for i, token in added.items():
        if i < len(pieces):
            plain = UNUSED if pieces[i].kind == NORMAL else pieces[i].kind
            pieces[i] = replace(pieces[i], text=token.content, kind=CONTROL if token.special else plain)
    for i, piece in enumerate(pieces):
        if piece.kind == USER_DEFINED and is_control(i, piece.text):
            pieces[i] = replace(piece, kind=CONTROL)
    backend = _unigram(pieces, proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(pieces, proto)
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = _decoder(proto.normalizer_spec)
    for i, piece in enumerate(pieces):
        token = added.get(i, AddedToken(piece.text, normalized=False))
        if piece.kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([_as_special(token)])
        elif piece.kind == UNUSED and i in added:
            backend.add_tokens([token])
    for i in sorted(i for i in added if i >= len(pieces)):
        backend.add_tokens([added[i]])
        if backend.token_to_id(added[i].content) != i:
            raise UserError(
                f"{path}: the added token {added[i].content!r} has id {i}, but the next free one is "
                f"{backend.token_to_id(added[i].content)}; correct added_tokens_decoder in tokenizer_config.json"
            )
    spec = proto.trainer_spec
    named = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    names = {name: pieces[i].text for name, i in named.items() if 0 <= i < len(pieces)}
    if add_bos and (bos := names.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    return backend, names


def _parse(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]: made at import
    with contextlib.suppress(DecodeError):
        proto.ParseFromString(path.read_bytes())
    if not proto.pieces:
        raise UserError(f"{path}: not a SentencePiece model; add a tokenizer.json to the directory")
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    wrong = ""
    if not spec.byte_fallback or sum(piece.type == BYTE for piece in proto.pieces) != 256:
        wrong = "no byte fallback"
    elif spec.model_type not in (UNIGRAM, BPE):
        wrong = "words or characters as pieces"
    elif spec.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        wrong = "blanks behind the words"
    if wrong:
        raise UserError(
            f"{path}: a SentencePiece model with {wrong}; expected BPE or Unigram with byte fallback, "
            "or a tokenizer.json beside it"
        )
    return proto


def _bpe(pieces: Sequence[_Piece], proto: Any) -> Backend:
    """A user's symbols are cut out before merging, and then taken whole."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    symbols = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    model = models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=_merges(pieces),
        unk_token=pieces[proto.trainer_spec.unk_id].text,
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=bool(symbols),
    )
    backend = Tokenizer(model)
    if symbols:
        longest_first = sorted((symbol.replace(" ", "▁") for symbol in symbols), key=len, reverse=True)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    return backend


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored third first."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == NORMAL}
    ranked = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-pieces[i].score, left, right))
    return [(pieces[left].text, pieces[right].text) for _, left, right in sorted(ranked)]


def _unigram(pieces: Sequence[_Piece], proto: Any) -> Backend:
    from tokenizers import Tokenizer, models

    def score(piece: _Piece) -> float:
        symbol = _SYMBOL * (len(piece.text.encode()) - 1)
        return {NORMAL: piece.score, USER_DEFINED: symbol}.get(piece.kind, _NEVER)

    scored = [(piece.text, score(piece)) for piece in pieces]
    return Tokenizer(models.Unigram(scored, unk_id=proto.trainer_spec.unk_id, byte_fallback=True))


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.remove_extra_whitespaces:  # at the end SentencePiece takes the sign for a blank, whoever wrote it
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _MANY if spec.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence(steps)


def _as_special(token: AddedToken) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )
