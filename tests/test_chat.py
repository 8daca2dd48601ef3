"""The chat: only the professional answer reaches the person, whatever the model writes and wherever it is cut."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkv.chat import AnswerFilter, read_questions, talk, unfold, without_fragment
from pkv.competition import Tokenizer, compose, parse, tag_leaks, train_tokenizer
from pkv.competition.tags import ORDER
from pkv.config import UserError
from pkv.evaluate.answering import Responder
from pkv.evaluate.groups import Source
from pkv.model import Arch
from pkv.sampling import Completion

ARCH = Arch(vocab_size=320, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, ffn=48, max_positions=2048)
ANSWER = "You need 24 hives, since 96 / 4 = 24 and 5 < 6.\nAnswer: \\boxed{24}"
COMPETITION = compose(
    {"pirate": "Arr, 96 / 4 = 24!", "knight": "By honour, 24.", "viking": "Skål, 20 + 4 = 24."},
    "All say 24. How thrilling.",
    "knight",
    ANSWER,
)
HEAD = COMPETITION.removesuffix(ANSWER)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([COMPETITION] * 5, 320, path)
    return Tokenizer.load(path)


class ScriptedEngine:
    """Says one prepared response after the other, some tokens at a time; keeps the prompts that it was given."""

    def __init__(self, tokenizer, responses, step=3):
        self.tokenizer, self.responses, self.step = tokenizer, list(responses), step
        self.prompts = []

    def sample(self, weights, requests, on_tokens=None):
        (request,) = requests
        self.prompts.append(self.tokenizer.decode(request.prompt))
        text = self.responses.pop(0)
        ids = np.append(self.tokenizer.encode(text), self.tokenizer.stop_ids[0]).astype(np.int32)
        finish = "stop" if len(ids) <= request.max_new_tokens else "length"
        ids = ids[: request.max_new_tokens]
        for at in range(0, len(ids), self.step):
            on_tokens(0, 0, ids[at : at + self.step])
        zeros = np.zeros(len(ids), np.float32)
        yield Completion(0, 0, ids, zeros, zeros, finish, zeros > 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def converse(tokenizer, questions, responses, screen=None, **options):
    engine = ScriptedEngine(tokenizer, responses)
    screen = io.StringIO() if screen is None else screen
    responder = Responder(Source(engine, {}, tokenizer), ARCH, "Compete.")
    return list(talk(responder, questions, screen, **options)), screen.getvalue(), engine


def stream(text, cuts=()):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    answer = AnswerFilter()
    pieces = [answer.feed(text[a:b]) for a, b in itertools.pairwise(places)]
    return [*pieces, answer.finish()]


def test_the_answer_streams_and_the_competition_does_not():
    pieces = stream(COMPETITION, range(len(COMPETITION)))
    assert "".join(pieces) == ANSWER
    assert sum(bool(piece) for piece in pieces) > 5
    assert not any(pieces[: len(HEAD) - 1])


TAG_LIKE = ["<Pirate>", "< /winner >", "<pirate role='x'>", "&lt;result&gt;", "[/knight]", "\\langle winner\\rangle"]
PIECES = [
    "<",
    "</",
    "<pi",
    "rate>",
    "`",
    "\n",
    " ",
    "5 < 6",
    "a[0]",
    "\\frac{1}{2}",
    "24",
    "Skål",
    "&amp;",
    "50%",
    "wort ",
]
FRAGMENTS = st.sampled_from([*ORDER, *TAG_LIKE, *PIECES])


@given(st.lists(FRAGMENTS, max_size=12), st.sets(st.integers(0, 400), max_size=40), st.booleans())
def test_no_tag_is_ever_shown(parts, cuts, competes):
    text = "".join(parts)
    shown = "".join(stream((HEAD if competes else "") + text, {len(HEAD) + cut for cut in cuts} if competes else cuts))
    assert not tag_leaks(shown)


@given(st.integers(0, len(COMPETITION)), st.sets(st.integers(0, len(COMPETITION))))
def test_a_response_cut_anywhere_shows_a_beginning_of_its_answer(end, cuts):
    shown = "".join(stream(COMPETITION[:end], cuts))
    assert ANSWER.startswith(shown) and (shown == "" or end > len(HEAD))


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="<>&\\%[]{}«»《》"), max_size=300),
    st.sets(st.integers(0, 300)),
)
def test_an_answer_without_tags_comes_whole(text, cuts):
    clean = "".join(char for char in text if char.isprintable() or char in "\n\t")
    shown = "".join(stream(HEAD + clean, {len(HEAD) + cut for cut in cuts}))
    if not tag_leaks(clean):
        assert shown == clean.strip()


@pytest.mark.parametrize("ending", ["<", "</", "</compet", "<pirate", "</winner", '<pirate name="x'])
def test_a_tag_that_is_cut_off_is_not_shown(ending):
    assert "".join(stream(HEAD + "It is 24. " + ending, range(2000))) == "It is 24."
    assert without_fragment(ending) == ""


def test_without_a_competition_the_response_is_the_answer():
    assert "".join(stream("It is 24.", range(9))) == "It is 24."
    assert "".join(stream("It is 24.</winner>", range(30))) == "It is 24."


def test_a_terminal_cannot_be_steered():
    assert "".join(stream(HEAD + "It\x1b[2J is\r\x07 24.\x9b")) == "It[2J is 24."


def test_a_turn_shows_the_answer_only(tokenizer):
    (reply,), screen, _ = converse(tokenizer, ["How many?"], [COMPETITION])
    assert screen == ANSWER + "\n" and reply.answer == ANSWER and reply.note == ""
    assert reply.winner == "knight" and reply.finish == "stop"
    assert [owner for owner, _ in reply.competition] == ["pirate", "knight", "viking", "result", "winner"]
    assert dict(reply.competition)["viking"] == "Skål, 20 + 4 = 24."


def test_a_terminal_gets_one_dim_line_about_the_competition(tokenizer):
    _, screen, _ = converse(tokenizer, ["How many?"], [COMPETITION], Terminal())
    first, rest = screen.split("\n", 1)
    assert first.startswith("\x1b[2mbehind the scenes: pirate, knight") and rest == ANSWER + "\n"


def test_the_competition_unfolds_without_its_tags(tokenizer):
    _, screen, _ = converse(tokenizer, ["How many?"], [COMPETITION], show_competition=True)
    assert "[pirate]\nArr, 96 / 4 = 24!\n" in screen and "[winner] knight\n" in screen
    assert screen.endswith(ANSWER + "\n") and not tag_leaks(screen.replace("[", "(").replace("]", ")"))


@pytest.mark.parametrize("show", [False, True])
def test_a_cut_reply_says_so_and_shows_no_tag_wherever_it_is_cut(tokenizer, show):
    length = len(tokenizer.encode(COMPETITION))
    seen = set()
    for limit in range(1, length, 3):
        (reply,), screen, _ = converse(tokenizer, ["Q"], [COMPETITION], max_new_tokens=limit, show_competition=show)
        assert reply.finish == "length" and f"cut off at {limit} tokens" in screen
        assert "<" not in screen.replace("5 < 6", "").replace("5 <", "") and "competition>" not in screen
        assert ANSWER.startswith(reply.answer)
        seen.add(bool(reply.answer))
    assert seen == {True, False}


def test_a_competition_without_an_end_is_no_answer(tokenizer):
    (reply,), screen, _ = converse(tokenizer, ["Q"], ["<competition>\n<pirate>\nArr, 24!"])
    assert reply.answer == "" and "broke off" in reply.note and "Arr" not in screen
    assert unfold(parse("<competition>\n<pirate>\nArr, 24! </pir")) == (("pirate", "Arr, 24!"),)


def test_only_professional_answers_are_remembered(tokenizer):
    replies, _, engine = converse(tokenizer, ["First <pirate>?", "Second?"], [COMPETITION, "It is 24."])
    assert len(replies) == 2
    second = engine.prompts[1]
    assert "First ‹pirate›?" in second and ANSWER in second and "Arr" not in second
    assert second.index("Compete.") < second.index("First") < second.index(ANSWER) < second.index("Second?")


def test_the_oldest_turns_go_when_the_context_is_full(tokenizer):
    word = "honour "
    questions = [f"{n}. {word * 60}?" for n in range(8)]
    _, _, engine = converse(tokenizer, questions, ["It is 24."] * 8, max_new_tokens=200)
    assert "0. honour" in engine.prompts[1] and "0. honour" not in engine.prompts[-1]
    assert "6. honour" in engine.prompts[-1] and "Compete." in engine.prompts[-1]
    assert all(len(tokenizer.encode(prompt)) < ARCH.max_positions for prompt in engine.prompts)


def test_a_short_context_remembers_too(tokenizer, monkeypatch):
    """One of fewer tokens than an answer may have by default has never room for that, and forgot every turn."""
    monkeypatch.setitem(globals(), "ARCH", dataclasses.replace(ARCH, max_positions=1024))
    _, _, engine = converse(tokenizer, ["First?", "Second?"], ["It is 24."] * 2)
    assert "First?" in engine.prompts[1]
    questions = [f"{n}. {'honour ' * 60}?" for n in range(8)]
    _, _, engine = converse(tokenizer, questions, ["It is 24."] * 8)
    assert "6. honour" in engine.prompts[-1] and "0. honour" not in engine.prompts[-1]


def test_a_question_that_is_too_long_is_the_users_mistake(tokenizer):
    with pytest.raises(UserError, match="expected 1 to 2047"):
        converse(tokenizer, ["x1" * 3000], ["It is 24."])
    replies, screen, _ = converse(tokenizer, ["Q", "x1" * 3000, "R"], ["It is 24.", "It is 25."])
    assert [reply.answer for reply in replies] == ["It is 24.", "It is 25."] and "expected 1 to 2047" in screen
    with pytest.raises(UserError, match="--max-new-tokens 3000: expected 1 to"):
        converse(tokenizer, ["Q"], ["It is 24."], max_new_tokens=3000)


def test_questions_end_with_the_input_or_exit():
    screen = io.StringIO()
    assert list(read_questions(io.StringIO("a\n\n b \nexit\nc\n"), screen)) == ["a", "b"]
    assert list(read_questions(io.StringIO("a"), screen)) == ["a"] and screen.getvalue() == ""
