"""The parser's invariants: spans tile, damage is coded and does not count, nothing is slow, nothing raises."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkv.competition.construct import TAGS, compose, is_exact_layout, tags_in_order
from pkv.competition.parser import parse, split_tokens, tag_leaks, tag_report, trace_tags
from pkv.competition.prompt import neutralise
from pkv.competition.tags import MOST_TAGS, ORDER, scan
from pkv.records import BLOCKS, OWNERS, Trace

FIGHTERS = {
    "pirate": "Arr, 4 * 6 = 24, me hearties.",
    "knight": "Let x be the sum; then x / 4 = 6, so x = 24.",
    "viking": "Ten and ten and four. 24!",
}
GOOD = compose(FIGHTERS, "How thrilling. I multiplied: 24 holds.", "knight", "There are 24.\nAnswer: 24")
DISGUISES = [
    *("<Pirate>", "</PIRATE>", "< pirate >", "</ knight>", "<pirate >", "<viking/>", "<result", "</winner"),
    *("<p i r a t e>", "<pir\nate>", "&lt;pirate&gt;", "&lt;/pirate&gt;", "&amp;lt;winner&amp;gt;", "&#60;knight&#62;"),
    *(
        "&#x3C;/result&#x3E;",
        r"\<viking\>",
        "＜pirate＞",
        "<ｐｉｒａｔｅ>",
        "<pi\u200brate>",
        "<\u2060/viking>",
        "<рirate>",
    ),
    *("<kníght>", "<𝐰𝐢𝐧𝐧𝐞𝐫>", "‹pirate›", "⟨/result⟩", "<**pirate**>", "<!--pirate-->", "<|knight|>", "%3Cpirate%3E"),
    *(r"$\langle$pirate$\rangle$", r"\u003cpirate\u003e", "[/pirate]", "{/viking}", "«/knight»", "`<pirate>`"),
    *('<pirate name="Jack">', "</pirate now>", "```\n<pirate>\n```", "<pirate>"),
]
HARMLESS = [
    *("5 < 6 and 7 > 6", "the pirate wins", "a < result\n", "x<resulting>", "a[result] = b[winner]", "(pirate)"),
    *(
        "« pirate »",
        "the <em>pirate</em>",
        "{winner}",
        r"\frac{result}{2} < \langle x \rangle",
        "a <pirates> b",
        "</p>",
    ),
    *("result > winner", "if i<k: return", "Answer: 24", "", "the winner's <answer>", "&lt;b&gt;", "pirate/knight"),
    *("<<>>", "<pirate-ship>", "f<g<h>>", "a\\\\b"),
]


def codes(trace: Trace) -> list[str]:
    return [error.code for error in trace.errors]


def owner_at(trace: Trace, piece: str) -> str:
    place = trace.text.index(piece)
    return next(s.owner for s in trace.segments if s.chars.start <= place < s.chars.stop)


def assert_tiles(trace: Trace, tokens: int) -> None:
    place = token = 0
    for segment in trace.segments:
        assert segment.chars.start == place and segment.chars.stop > place
        assert segment.tokens.start == token and segment.tokens.stop >= token
        owners = trace.token_owners[segment.tokens.start : segment.tokens.stop]
        assert (owners == OWNERS.index(segment.owner)).all()
        place, token = segment.chars.stop, segment.tokens.stop
    assert place == len(trace.text)
    assert len(trace.token_owners) == tokens and trace.token_owners.dtype == np.int8
    assert token == (tokens if trace.segments else 0)
    for name, block in trace.blocks.items():
        assert name == block.name and name in BLOCKS
        assert 0 <= block.chars.start <= block.chars.stop <= len(trace.text)
        assert 0 <= block.tokens.start <= block.tokens.stop <= tokens


def test_a_whole_competition_is_taken_apart_exactly():
    trace = parse(GOOD)
    assert trace.errors == () and tags_in_order(trace) and is_exact_layout(trace)
    assert set(trace.blocks) == set(BLOCKS)
    for name, text in FIGHTERS.items():
        assert trace.block_text(name) == f"\n{text}\n"
    assert trace.block_text("winner") == "knight"
    assert trace.block_text("answer") == "\nThere are 24.\nAnswer: 24"
    assert trace.block_text("result") == "\nHow thrilling. I multiplied: 24 holds.\n<winner>knight</winner>\n"
    assert owner_at(trace, "knight</winner>") == "winner" and owner_at(trace, "<winner>") == "tags"
    assert "outside" not in {segment.owner for segment in trace.segments}
    assert_tiles(trace, len(split_tokens(GOOD)) - 1)


def test_tokens_that_straddle_a_border_belong_to_the_tag():
    text = "<pirate>ab</pirate>cd"
    # Tokens: "<pir" "ate>a" "b</" "pirate" ">c" "d", and a stop token without characters.
    trace = parse(text, np.array([0, 4, 9, 12, 18, 20, 21, 21], np.int32))
    assert [OWNERS[i] for i in trace.token_owners] == ["tags"] * 5 + ["outside"] * 2
    assert trace.blocks["pirate"].tokens == (2, 2)
    trace = parse(text, np.arange(len(text) + 1))
    assert trace.blocks["pirate"].tokens == trace.blocks["pirate"].chars == (8, 10)


def test_the_stop_token_belongs_to_the_answer():
    offsets = np.append(split_tokens(GOOD), len(GOOD))
    trace = parse(GOOD, offsets)
    assert OWNERS[trace.token_owners[-1]] == "answer" and trace.blocks["answer"].tokens.stop == len(offsets) - 1


@pytest.mark.parametrize("offsets", [[], [0], [1, len(GOOD)], [[0, len(GOOD)]], [0, 5]])
def test_offsets_that_do_not_fit_the_text_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets"):
        parse(GOOD, np.array(offsets, np.int32))


@pytest.mark.parametrize(
    ("old", "new", "expected", "report"),
    [
        ("</knight>\n", "", ["unclosed"], (11, 0, 1)),
        ("<knight>\n", "", ["missing"], (11, 0, 1)),
        ("<winner>knight</winner>\n", "", ["missing", "missing"], (10, 0, 2)),
        ("<pirate>", "<pirate>\n<pirate>", ["duplicate"], (12, 1, 0)),
        ("Arr", "<viking>Arr</viking>", ["duplicate", "duplicate", "nested"], (10, 2, 0)),
        ("<winner>knight</winner>\n</result>", "</result>\n<winner>knight</winner>", ["misordered"], (11, 0, 0)),
        ("<pirate>", '<pirate hat="yes">', ["attribute", "missing"], (11, 0, 1)),
        ("<pirate>", "<Pirate>", ["disguised", "missing"], (11, 0, 1)),
        ("<pirate>", "&lt;pirate&gt;", ["disguised", "missing"], (11, 0, 1)),
        ("<pirate>", r"\<pirate>", ["disguised", "missing"], (11, 0, 1)),
        ("<pirate>", "`<pirate>`", ["fenced", "missing"], (11, 0, 1)),
        ("There are", "<pirate> There are", ["duplicate"], (12, 1, 0)),
        ("There are", "<Pirate> There are", ["disguised"], (12, 0, 0)),
        ("Arr,", r"Arr \\", [], (12, 0, 0)),
        ("Arr,", "```\ncode\n```", [], (12, 0, 0)),
        ("Arr,", "```\nnever closed", [], (12, 0, 0)),
        ("Arr,", "5 < 6 <b> &lt; {x} [result]", [], (12, 0, 0)),
    ],
)
def test_each_damage_has_its_code_and_costs_only_itself(old, new, expected, report):
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    trace, found = parse(text), tag_report(text)
    assert sorted(codes(trace)) == expected
    assert (len(found.placed), found.duplicates, found.missing) == report
    assert tags_in_order(trace) == (report == (12, 0, 0))
    assert is_exact_layout(trace) == (report == (12, 0, 0) and not expected)
    assert_tiles(trace, len(split_tokens(text)) - 1)


def test_swapped_and_nested_fighters_lose_only_their_places():
    pirate, knight = (f"<{name}>\n{FIGHTERS[name]}\n</{name}>\n" for name in ("pirate", "knight"))
    swapped = parse(GOOD.replace(pirate + knight, knight + pirate))
    assert codes(swapped) == ["misordered", "misordered"]
    assert len(tag_report(swapped.text).placed) == 10
    assert swapped.block_text("pirate") == f"\n{FIGHTERS['pirate']}\n"  # found, though late
    nested = parse(GOOD.replace(pirate + knight, f"<pirate>\n{knight}</pirate>\n"))
    assert codes(nested) == ["nested"] and "pirate" not in nested.blocks and "knight" in nested.blocks
    assert nested.errors[0].at == nested.text.index("<knight>")


def test_a_fenced_competition_has_no_tags():
    trace = parse(f"```xml\n{GOOD}\n```")
    assert set(codes(trace)) == {"fenced", "missing"} and not trace.blocks
    assert tag_report(trace.text).missing == 12 and not trace_tags(trace.text)


def test_a_cut_off_trace_keeps_its_owners_and_its_whole_blocks():
    text = GOOD[: GOOD.index("Let x be") + 8]
    trace = parse(text, truncated=True)
    assert trace.truncated and "truncated" in codes(trace) and "unclosed" in codes(trace)
    assert set(trace.blocks) == {"pirate"} and owner_at(trace, "Let x") == "knight"
    in_result = parse(GOOD[: GOOD.index("\n</result>")] + " and the", truncated=True)
    assert set(in_result.blocks) == {"pirate", "knight", "viking", "winner"}
    assert owner_at(in_result, "How thrilling") == owner_at(in_result, " and the") == "result"
    whole = parse(GOOD, truncated=True)
    assert codes(whole) == ["truncated"] and is_exact_layout(whole)


def test_a_misplaced_end_makes_no_answer():
    text = "<competition><pirate>a</pirate></competition>" + GOOD.partition("</pirate>")[2]
    early = parse(text.replace("\n</competition>", ""))
    assert "answer" not in early.blocks and "misordered" in codes(early)
    assert "answer" not in parse("24").blocks and parse("24").segments[0].owner == "outside"


def test_duplicate_blocks_pay_nobody():
    trace = parse(GOOD.replace("<knight>", "<pirate>\nMore!\n</pirate>\n<knight>"))
    assert owner_at(trace, "More!") == "outside" and trace.block_text("pirate") == f"\n{FIGHTERS['pirate']}\n"
    assert codes(trace) == ["duplicate", "duplicate"]
    after = parse(GOOD + "\n<knight>\nsecret\n</knight>")
    assert owner_at(after, "secret") == "answer" and after.block_text("knight") == f"\n{FIGHTERS['knight']}\n"
    assert tag_leaks(after.block_text("answer") or "")


def test_a_disguised_tag_is_the_structures_before_the_answer_and_the_answers_in_it():
    assert owner_at(parse(GOOD.replace("Arr", "<Knight> Arr")), "<Knight>") == "tags"
    assert owner_at(parse(GOOD.replace("There are", "<Knight> There are")), "<Knight>") == "answer"


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_tag_leaks_in_every_disguise(disguise):
    assert tag_leaks(disguise) and tag_leaks(f"The answer is {disguise}\n24.")


@pytest.mark.parametrize("disguise", [text for text in DISGUISES if text != "<pirate>"])
def test_no_disguise_counts_as_a_tag(disguise):
    assert not trace_tags(disguise)
    trace = parse(GOOD.replace("Arr", f"Arr\n{disguise}\n"))
    assert {"attribute", "fenced", "disguised"} & set(codes(trace)) and not is_exact_layout(trace)
    assert tag_report(trace.text).duplicates == 0


@pytest.mark.parametrize("text", HARMLESS)
def test_honest_text_is_no_leak(text):
    assert not tag_leaks(text)


@pytest.mark.parametrize(
    "text",
    [
        " " + GOOD,
        "Sure!\n" + GOOD,
        GOOD.replace("\n<knight>", "\n\n<knight>"),
        GOOD.replace("\n<knight>", "<knight>"),
        GOOD.replace("<winner>knight", "<winner> knight"),
        GOOD.replace(FIGHTERS["pirate"], ""),
        GOOD.replace("How thrilling. I multiplied: 24 holds.", ""),
        GOOD.replace(">knight<", "><"),
        GOOD[: GOOD.index("</competition>") + 14],
        GOOD.replace("</viking>", "</viking>\nby the way"),
    ],
)
def test_a_loose_layout_has_its_tags_in_order_but_is_not_exact(text):
    trace = parse(text)
    assert tags_in_order(trace) and not is_exact_layout(trace)


def test_compose_strips_and_wants_every_fighter():
    padded = {name: f"\n  {text} \n" for name, text in FIGHTERS.items()}
    again = compose(padded, " How thrilling. I multiplied: 24 holds.", " knight\n", "\nThere are 24.\nAnswer: 24 ")
    assert again == GOOD and is_exact_layout(parse(GOOD + "\n"))
    with pytest.raises(KeyError):
        compose({"pirate": "a"}, "r", "pirate", "1")


def test_the_twelve_tags_are_the_six_names_opened_and_closed():
    assert len(ORDER) == 12 and set(ORDER) == {f"<{slash}{name}>" for name in TAGS for slash in ("", "/")}


def test_every_error_says_its_place_and_repeats_are_said_once():
    trace = parse("<pirate>" * 5 + "<Pirate>" * 3)
    assert codes(trace).count("duplicate") == codes(trace).count("disguised") == 1
    assert all(0 <= error.at <= len(trace.text) and error.message for error in trace.errors)
    assert [error.at for error in trace.errors] == sorted(error.at for error in trace.errors)
    assert "5 times" in next(e.message for e in trace.errors if e.code == "duplicate")


PIECES = st.sampled_from(
    [*ORDER, *ORDER, *DISGUISES, "```\n", "\n", " ", "`", "\\", "<", ">", "/", "&lt;", "24 ", "é", "\u200b", "😀"]
)


@st.composite
def mutated_traces(draw) -> str:
    """A good competition, cut up, with pieces dropped, doubled, moved and put in; or pieces alone."""
    text = GOOD if draw(st.booleans()) else "".join(draw(st.lists(PIECES, max_size=30)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 60)))
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["drop", "double", "insert", "text"]))
        if kind == "drop":
            text = text[:start] + text[stop:]
        elif kind == "double":
            text = text[:at] + text[start:stop] + text[at:]
        else:
            text = text[:at] + draw(PIECES if kind == "insert" else st.text(max_size=10)) + text[at:]
    return text


@settings(max_examples=300)
@given(
    text=mutated_traces(),
    cuts=st.lists(st.integers(0, 600), max_size=40),
    truncated=st.booleans(),
    given_offsets=st.booleans(),
)
def test_any_text_is_tiled_with_any_tokens(text, cuts, truncated, given_offsets):
    offsets = (
        np.array(sorted([0, len(text), *(min(cut, len(text)) for cut in cuts)]), np.int32) if given_offsets else None
    )
    trace = parse(text, offsets, truncated)
    assert_tiles(trace, (len(offsets) if offsets is not None else len(split_tokens(text))) - 1)
    report = tag_report(text)
    tags = trace_tags(text)
    assert len(report.placed) <= 12 - report.missing and len(tags) == 12 - report.missing + report.duplicates
    assert tags_in_order(trace) == (len(report.placed) == 12 and len(tags) == 12)
    if is_exact_layout(trace):
        assert tags_in_order(trace) and set(codes(trace)) <= {"truncated"} and set(trace.blocks) == set(BLOCKS)
    damaged = any(tag.damage for tag in scan(text))
    assert (trace.errors == ()) == (tags_in_order(trace) and not truncated and not damaged)
    for name, block in trace.blocks.items():
        if name != "answer":
            assert text[: block.chars.start].endswith(f"<{name}>") and text[block.chars.stop :].startswith(f"</{name}>")


@settings(max_examples=200)
@given(st.text())
def test_split_tokens_tiles_any_text(text):
    offsets = split_tokens(text)
    assert offsets[0] == 0 and offsets[-1] == len(text) and offsets.dtype == np.int32
    assert (np.diff(offsets) > 0).all()


def best_time(text: str, times_over: int = 2) -> float:
    times = []
    for _ in range(times_over):
        start = time.process_time()
        parse(text)
        times.append(time.process_time() - start)
    return min(times)


def test_200_000_characters_take_under_50_ms():
    sentence = "No, that is wrong: $\\frac{3}{4} < 5$, so let me fix it; the 12 ships carry {x} & 96 candles [y]. "
    text = compose(dict.fromkeys(FIGHTERS, sentence * 640), sentence * 120, "pirate", "24")
    assert len(text) > 195_000
    assert set(parse(text).blocks) == set(BLOCKS)
    assert best_time(text, 10) < 0.05


def test_what_follows_a_thousand_tags_is_no_competition_but_a_question_is_neutralised_to_its_end():
    flood = "<pirate>" * MOST_TAGS
    trace = parse(flood + GOOD)
    assert "answer" not in trace.blocks and len(trace_tags(flood + GOOD)) == MOST_TAGS
    assert_tiles(trace, len(split_tokens(flood + GOOD)) - 1)
    assert "<" not in neutralise(flood * 2 + GOOD)


SLOW_FOR_OTHERS = [
    *("<", "<pirate>", "<pirate>a", "<pirate ", "<Pirate>", "&amp;", "\\", "```\n", "``` \n<pirate>\n", "< / *", " "),
    *("<result><winner>", "\u200b", "<c-o-m-p-e-t-i-t-i-o-", "{/", "~~~a\n"),
]


@pytest.mark.parametrize("piece", SLOW_FOR_OTHERS)
def test_no_text_is_slow(piece):
    short, long = (piece * (size // len(piece)) for size in (25_000, 100_000))
    assert best_time(long, 5) < 0.1
    assert best_time(long) < 12 * best_time(short) + 0.02  # linear: four times the text, not sixteen times the time
