"""Watches: any pieces give the same row, a stop is at its earliest token, a block never outgrows its budget."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pkv.competition.construct import compose, is_exact_layout
from pkv.competition.parser import parse, tag_report, trace_tags
from pkv.competition.tags import ORDER, scan
from pkv.competition.tokenizer import Tokenizer
from pkv.competition.train_tokenizer import train_tokenizer
from pkv.competition.watch import block_budget, stop_strings, together
from pkv.config import UserError
from pkv.records import FIGHTERS, Verdict, Watch

FIGHTS = dict.fromkeys(FIGHTERS, "Arr, 5 < 6 and 4 * 6 = 24, me hearties; no, let me see, that be wrong: it is 24.")
GOOD = compose(FIGHTS, "How thrilling.", "knight", "There are 24.\nAnswer: 24")
# Tokens over the borders of tags, lines and code, which no text becomes but which a model could say.
ODD = [
    *(
        "b</pir",
        "ate>\n<kni",
        "</pirate>\n<knight>Sir",
        "x</",
        ">`",
        "`<",
        "\n```",
        "```\n",
        ">\n",
        " <",
        "e></knight>",
    ),
    *("<pirate>a", "pirate>", "\\<", "St", "STOP"),
]
FRAGMENTS = [
    *ORDER[1:7] * 2,
    *ORDER,
    *(
        "<",
        "</",
        "</pir",
        "</pirate",
        "ate>",
        ">",
        "<Pirate>",
        "<knight ",
        "5 < 6",
        "`",
        "``",
        "```",
        "\n",
        "\\",
        "~~~",
    ),
    *("\n```python\n", "\n```\n", "`</pirate>`", "`<viking>`", "Arr", " ", "é", "😀", "STOP", "OP", "24.", "a\nb"),
]
STOPS = ["STOP", "</pirate>", "24", "é", "😀a", "\n", "TO", "a", "  ", "OPST", " a", "r\nA"]
LETTERS = "▁abcdefghijklmnopqrstuvwxyzASTOP0123456789.,;:*=>/`~\\"
Part = str | int | tuple[str, ...]


def write(path: Path, backend: Backend, special: str) -> Tokenizer:
    backend.add_special_tokens([special])
    backend.add_tokens(ODD)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": special}))
    return Tokenizer.load(path, light=True)


@pytest.fixture(scope="module")
def bytelevel(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytelevel")
    train_tokenizer([GOOD] * 5, 330, path)
    return write(path, Backend.from_file(str(path / "tokenizer.json")), "<|im_end|>")


def llama(path: Path, pieces: Iterable[str]) -> Tokenizer:
    """`▁` for blanks, one of which goes from the text's beginning, and bytes for what is no piece, as the newline."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -20.0) for b in range(256))]
    backend = Backend(models.Unigram([*vocabulary, *((piece, -3.0) for piece in pieces)], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return write(path, backend, "</s>")


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> Tokenizer:
    return llama(tmp_path_factory.mktemp("llama"), [*LETTERS, "<", "▁the", "irate", "</", "pirate", "▁<", "▁▁"])


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory) -> Tokenizer:
    """`▁` for blanks, none of them in the text's first token; what is no piece is unknown."""
    pieces = ["<unk>", *LETTERS, "<", "\n", "é", "▁the", "</", "▁a", "▁<"]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return write(tmp_path_factory.mktemp("metaspace"), backend, "</s>")


@pytest.fixture(scope="module", params=["bytelevel", "llama_like", "metaspace"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def tokens_of(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """Texts as the tokenizer reads them or, in tuples, character by character; numbers are any tokens."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part % (tokenizer.vocab_size + 3))
        else:
            ids += [
                i
                for text in ([part] if isinstance(part, str) else part)
                for i in tokenizer.encode_inside(text).tolist()
            ]
    return ids


def odd(tokenizer: Tokenizer, text: str) -> int:
    return tokenizer._backend.token_to_id(text)


TEXTS = st.sampled_from(FRAGMENTS)
PARTS = st.lists(st.one_of(TEXTS, TEXTS.map(tuple), TEXTS, st.integers(0, 2**31 - 4)), max_size=16)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def roll(watch: Watch, script: Sequence[int], sizes: Iterable[int] = (1,)) -> tuple[list[int], list[bool], bool]:
    """An engine whose policy says the script: the row's tokens, which of them were forced, whether a watch ended it."""
    row: list[int] = []
    forced: list[bool] = []
    owed: list[int] = []
    place, size = 0, itertools.cycle(sizes)
    while place < len(script) or owed:
        count = next(size)
        told = owed[:count]
        told += script[place : place + count - len(told)]
        verdict = watch(np.array(told, np.int32))
        assert 1 <= verdict.keep <= len(told) and verdict.forced.dtype == np.int32
        back = min(verdict.keep, len(owed))
        row += told[: verdict.keep]
        forced += [True] * back + [False] * (verdict.keep - back)
        place += verdict.keep - back
        assert verdict.keep == len(told) or verdict.done or len(verdict.forced)
        owed = verdict.forced.tolist() or owed[back:]
        if verdict.done:
            return row, forced, True
    return row, forced, False


# The texts of rows


def streams(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether the stream gives the text of the tokens, but for a broken half of a character at its end."""
    stream, text = tokenizer.stream(), tokenizer.decode(ids)
    shown = "".join(stream.feed(i) for i in ids)
    return text.rstrip("\ufffd") == shown.rstrip("\ufffd") and (stream.waits or text == shown)


@given(parts=PARTS)
def test_the_stream_of_a_row_is_its_text(bytelevel, metaspace, parts):
    for each in (bytelevel, metaspace):
        assert streams(each, tokens_of(each, parts))


@given(parts=PARTS)
def test_the_stream_of_byte_tokens_differs_in_broken_runs_only(llama_like, parts):
    ids = tokens_of(llama_like, parts)
    assert "\ufffd" in llama_like.decode(ids) or streams(llama_like, ids)


def test_text_inside_a_row_begins_with_no_blank(tokenizer):
    for text in ("</pirate>", "\n</knight>", "a b"):
        ids = [*tokenizer.encode("a").tolist(), *tokenizer.encode_inside(text).tolist()]
        assert tokenizer.decode(ids) == "a" + text


# Stop strings


@given(parts=PARTS, sizes=SIZES, strings=st.lists(st.sampled_from(STOPS), max_size=3))
@settings(max_examples=150)
def test_a_row_stops_at_the_earliest_token_with_a_stop_string(tokenizer, parts, sizes, strings):
    ids = tokens_of(tokenizer, parts)
    texts = (tokenizer.decode(ids[: t + 1]) for t in range(len(ids)))
    expected = next((t + 1 for t, text in enumerate(texts) if any(string in text for string in strings)), None)
    row, _, done = roll(stop_strings(tokenizer, strings)(), ids, sizes)
    assert done == (expected is not None) and row == ids[:expected]


def test_a_stop_string_is_found_over_half_characters_and_inside_tokens(bytelevel):
    half = bytelevel.encode_inside("😀").tolist()
    ids = [*bytelevel.encode("Arr").tolist(), *half, odd(bytelevel, "</pirate>\n<knight>Sir"), 5]
    assert len(half) > 1
    for size in (1, 2, 50):
        row, _, done = roll(stop_strings(bytelevel, ["r😀"])(), ids, [size])
        assert done and row == ids[:-2]
        row, _, done = roll(stop_strings(bytelevel, ["nope", "😀</pirate>\n<k"])(), ids, [size])
        assert done and row == ids[:-1]


def test_of_two_stop_strings_in_a_piece_the_one_that_is_whole_first_counts(bytelevel):
    ids = tokens_of(bytelevel, [tuple("a 24 me b")])
    row, _, done = roll(stop_strings(bytelevel, ["24 me", "4", "b"])(), ids, [50])
    assert done and bytelevel.decode(row) == "a 24"


def test_a_stop_string_that_spells_a_control_token_is_that_token_too(bytelevel):
    """As people give <|im_end|>: in the text that stop strings are found in, such a token has no characters."""
    (spelling, number), *_ = bytelevel.control_ids.items()
    before = tokens_of(bytelevel, [tuple("a 24")])
    for size in (1, 50):
        row, _, done = roll(stop_strings(bytelevel, ["nope", spelling])(), [*before, number, 5], [size])
        assert done and row == [*before, number]
        row, _, done = roll(stop_strings(bytelevel, [spelling, "4"])(), [*before, number, 5], [size])
        assert done and row == before, "what comes first counts"
        spelled = [*before, *bytelevel.encode_inside(spelling).tolist(), 5]
        row, _, done = roll(stop_strings(bytelevel, [spelling])(), spelled, [size])
        assert done and bytelevel.decode(row) == "a 24" + spelling


@pytest.mark.parametrize("strings", [[""], ["a", ""], ["\ufffd"]])
def test_a_stop_string_without_text_is_the_users_mistake(bytelevel, strings):
    with pytest.raises(UserError, match="stop string"):
        stop_strings(bytelevel, strings)


# Budgets


def open_block(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, int]:
    """By the parser's scan of everything: whose block is open and how many tokens it holds.

    The letter behind the text leaves its last line unfinished: a fence is one when its line has ended.
    """
    text, offsets = tokenizer.decode_with_offsets(ids)
    tags = trace_tags(text + "x")
    if not tags or tags[-1].closing or tags[-1].name not in FIGHTERS:
        return "", 0
    whole = int(np.searchsorted(offsets[1:], tags[-1].chars.stop))
    return tags[-1].name, len(ids) - whole - 1


def spoken(tokenizer: Tokenizer, row: Sequence[int], forced: Sequence[bool]) -> dict[str, int]:
    """The tokens of each fighter's block as the parser counts them, without those that were forced."""
    text, offsets = tokenizer.decode_with_offsets(row)
    blocks = parse(text, offsets).blocks
    return {name: sum(not forced[t] for t in range(*blocks[name].tokens)) for name in FIGHTERS if name in blocks}


@given(parts=PARTS, sizes=SIZES, budget=st.integers(1, 12))
@settings(max_examples=200)
def test_the_pieces_of_a_row_change_nothing(tokenizer, parts, sizes, budget):
    ids = tokens_of(tokenizer, parts)
    maker = block_budget(tokenizer, budget)
    assert roll(maker(), ids, sizes) == roll(maker(), ids)


@given(parts=PARTS, budget=st.integers(1, 12))
@settings(max_examples=200)
def test_a_block_is_closed_at_the_very_token_that_spends_its_budget(tokenizer, parts, budget):
    row, forced, _ = roll(block_budget(tokenizer, budget)(), tokens_of(tokenizer, parts))
    for t in range(len(row)):
        if forced[t]:
            continue
        name, held = open_block(tokenizer, row[: t + 1])
        follows = t + 1 < len(row) and forced[t + 1]
        assert follows == bool(name and held >= budget)
        if follows:
            stop = next((k for k in range(t + 1, len(row)) if not forced[k]), len(row))
            text = tokenizer.decode(row[:stop])
            assert trace_tags(text)[-1].form == f"</{name}>" and text.endswith(f"</{name}>")


@given(parts=PARTS, sizes=SIZES, budget=st.integers(1, 12))
@settings(max_examples=200)
def test_no_block_outgrows_its_budget(tokenizer, parts, sizes, budget):
    row, forced, _ = roll(block_budget(tokenizer, budget)(), tokens_of(tokenizer, parts), sizes)
    if not any(tag.damage == "fenced" for tag in scan(tokenizer.decode(row))):  # code can close over a tag that counted
        assert all(held <= budget for held in spoken(tokenizer, row, forced).values())


def test_a_competition_within_its_budget_is_left_alone(tokenizer):
    ids = tokens_of(tokenizer, [GOOD])
    held = max(spoken(tokenizer, ids, [False] * len(ids)).values())
    unfinished = max(len(tokenizer.encode_inside(f"\n</{name}>")) for name in FIGHTERS)
    row, forced, _ = roll(block_budget(tokenizer, held + unfinished)(), ids, [7])
    assert row == ids and not any(forced)
    row, forced, _ = roll(block_budget(tokenizer, held - 1)(), ids, [7])
    assert any(forced)


def test_a_tag_that_is_finished_by_force_is_the_text_that_the_policy_began(bytelevel):
    ids = tokens_of(bytelevel, ["<pirate>", tuple("a</pirate>")])
    for budget in range(2, 10):
        row, forced, _ = roll(block_budget(bytelevel, budget)(), ids[: budget - 10])
        assert bytelevel.decode(row) == "<pirate>a</pirate>" and any(forced)


@pytest.mark.parametrize("budget", range(2, 40, 3))
def test_what_is_closed_by_force_stands_in_the_exact_layout(tokenizer, budget):
    short = compose(dict.fromkeys(FIGHTERS, "24"), "How thrilling.", "knight", "Answer: 24")
    start = tokens_of(tokenizer, ["<competition>\n<pirate>", "\nArr,that's,24,and so" * 5])
    verdict = block_budget(tokenizer, budget)()(np.array(start, np.int32))
    stop = verdict.keep + len(verdict.forced)
    row = [*start[: verdict.keep], *verdict.forced.tolist(), *tokens_of(tokenizer, [short.split("</pirate>")[1]])]
    trace = parse(*tokenizer.decode_with_offsets(row))
    assert len(tag_report(trace.text).placed) == 12
    assert is_exact_layout(trace) or trace.text[trace.blocks["pirate"].chars.stop - 2] in " \n"  # as the policy left it
    assert spoken(tokenizer, row, [verdict.keep <= t < stop for t in range(len(row))])["pirate"] == budget


def force(tokenizer: Tokenizer, parts: Iterable[Part], held: int) -> str:
    """What is forced behind the parts' tokens, of which the last `held` are the open block's."""
    ids = tokens_of(tokenizer, parts)
    verdict = block_budget(tokenizer, held)()(np.array(ids, np.int32))
    assert verdict.keep == len(ids) and not verdict.done
    return tokenizer.decode([*tokenizer.encode("a"), *verdict.forced])[1:]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("a", "\n</pirate>"),
        ("a\n", "</pirate>"),
        ("a<", "/pirate>"),
        ("a</pi", "rate>"),
        ("a</pirate", ">"),
        ("a</kni", "\n</pirate>"),
        ("`</pir", "\n</pirate>"),
        ("\\</pir", "\n</pirate>"),
        ("\\\\</pir", "ate>"),
        ("a</pir ", "\n</pirate>"),
        ("a\n```py\nx", "\n```\n</pirate>"),
        ("a\n````\nx\n", "````\n</pirate>"),
        ("a\n~~~", "\n~~~\n</pirate>"),
        ("a\n```\nx\n```", "\n</pirate>"),
        ("a\n```\nx\n```\n", "</pirate>"),
        ("a ```", "\n</pirate>"),
    ],
)
def test_what_is_forced_fits_what_stands_there(bytelevel, said, expected):
    held = len(tokens_of(bytelevel, [tuple(said)]))
    assert force(bytelevel, ["<pirate>", tuple(said)], held) == expected


def test_half_a_character_is_no_beginning_of_a_tag(bytelevel):
    half = bytelevel.encode_inside("😀").tolist()[0]
    assert force(bytelevel, ["<pirate>", tuple("a</pir"), half], 7) == "\n</pirate>"
    assert force(bytelevel, ["<pirate>", tuple("a\n"), half], 3) == "\n</pirate>"


def test_a_fence_from_before_the_block_is_left_open(bytelevel):
    assert force(bytelevel, ["```\n<pirate>", tuple("a\n")], 2) == "</pirate>"


def test_a_fence_that_was_cut_off_swallows_no_later_block(bytelevel):
    start, rest = (
        "<competition>\n<pirate>\n```py\n",
        "\n" + GOOD.split("</pirate>\n")[1].replace("Arr", "```\nx\n```", 1),
    )
    row, forced, _ = roll(block_budget(bytelevel, 60)(), tokens_of(bytelevel, [start, tuple("x = 1\n" * 9), rest]))
    text = bytelevel.decode(row)
    assert sum(forced) and "```\n</pirate>" in text and not any(tag.damage for tag in scan(text))


def test_a_tag_in_code_that_closes_closes_no_block(bytelevel):
    for code in (
        "`</pirate>`",
        "\n```\n</pirate>\n```\n",
        "`</pirate>`\n~~~\n</pirate></knight>\n~~~\n",
        "\n``` </pirate>\n```\n",
    ):
        ids = tokens_of(bytelevel, ["<pirate>", tuple(code), tuple("abcdefghij")])
        held = len(ids) - len(tokens_of(bytelevel, ["<pirate>"]))
        row, forced, _ = roll(block_budget(bytelevel, held)(), ids)
        assert row[: len(ids)] == ids and all(forced[len(ids) :]) and sum(forced)


def test_a_close_that_broken_bytes_swallow_is_not_forced_again(tmp_path):
    byte_tags = llama(tmp_path, LETTERS)  # no piece has the bracket
    half = byte_tags.encode_inside("é").tolist()[0]
    row, forced, _ = roll(block_budget(byte_tags, 2)(), tokens_of(byte_tags, ["<pirate>", "a", half, "aaaaaa"]))
    assert "</pirate>" not in byte_tags.decode(row) and sum(forced) == len(byte_tags.encode_inside("\n</pirate>"))


def test_a_budget_below_one_is_the_users_mistake(bytelevel):
    with pytest.raises(UserError, match="block budget: got 0"):
        block_budget(bytelevel, 0)


# Several watches


@given(parts=PARTS, sizes=SIZES, budget=st.integers(1, 12), strings=st.lists(st.sampled_from(STOPS), max_size=2))
@settings(max_examples=150)
def test_together_the_earliest_cut_wins(tokenizer, parts, sizes, budget, strings):
    ids = tokens_of(tokenizer, parts)
    makers = [stop_strings(tokenizer, strings), block_budget(tokenizer, budget), block_budget(tokenizer, budget + 3)]
    row, forced, done = roll(together(*makers)(), ids, sizes)
    alone, alone_forced, _ = roll(makers[1](), ids)
    stopped, _, stops = roll(makers[0](), alone)
    assert (row, forced, done) == (stopped, alone_forced[: len(stopped)], stops)


def test_an_end_comes_before_a_forced_text_and_the_first_forced_text_before_others(bytelevel):
    ids = tokens_of(bytelevel, ["<pirate>", tuple("abcdef")])
    said = len(ids) - 6
    close = bytelevel.encode_inside("\n</pirate>").tolist()
    other = np.array(
        [*[ids[-1]] * (len(close) - 1), close[-1]], np.int32
    )  # as long as the tag, and with its last token

    def shout() -> Watch:
        heard = itertools.count(1)
        return lambda tokens: Verdict(1, other if next(heard) == said + 3 else other[:0], False)

    makers = [shout, block_budget(bytelevel, 3), stop_strings(bytelevel, ["abc"])]
    row, forced, done = roll(together(*makers)(), ids, [4])
    assert done and row == ids[:-3] and not any(forced)
    row, _, done = roll(together(*makers[:2])(), ids, [50])
    assert not done and row == [*ids[:-3], *other, *close, *ids[-3:]]


def test_together_alone_and_none(bytelevel):
    ids = np.array(tokens_of(bytelevel, ["a STOP a"]), np.int32)
    alone = stop_strings(bytelevel, ["STOP"])
    assert together(alone)()(ids).keep == alone()(ids).keep < len(ids)
    verdict = together()()(ids)
    assert (verdict.keep, len(verdict.forced), verdict.done) == (len(ids), 0, False)


def test_no_piece_costs_more_because_much_was_said(bytelevel):
    for text in ("<pirate>" + "a" * 50_000, "<pirate>" + "`" * 50_000, "<pirate>" + "\n```\n<b>" * 5_000):
        ids = np.array(tokens_of(bytelevel, [text]), np.int32)
        watch = together(stop_strings(bytelevel, ["STOP", "x" * 99]), block_budget(bytelevel, 10**6))()
        start = time.process_time()
        assert all(watch(piece).keep == len(piece) for piece in np.array_split(ids, len(ids) // 3))
        assert time.process_time() - start < 60  # reading all anew at each piece takes many minutes
