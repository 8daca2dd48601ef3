"""A conversation in a chat template's words, its control tokens told apart from what people wrote.

While the template is rendered, a mark stands before and behind every character of a message that is no blank. So the
template can trim and split a message as it likes, and yet no spelling of a control token in it is one any more.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

Messages = Sequence[Mapping[str, str]]
_PRIVATE = range(0xE000, 0x110000)


class RefusalError(Exception):
    """The template refuses the messages, or leaves one of them out."""


def render_chat(chat_form: Any, messages: Messages, generate: bool) -> tuple[str, re.Pattern[str]]:
    """The template's text with marks in it, and what finds the marks.

    chat_form: transformers' tokenizer. generate: end with what begins the answer. Raises RefusalError.
    """
    taken = {char for message in messages for text in message.values() for char in text} | {*chat_form.chat_template}
    free = (chr(c) for c in _PRIVATE if chr(c) not in taken)
    marks = [next(free) for _ in range(len(messages) + 1)]
    any_mark = re.compile(f"[{''.join(marks)}]")
    apart = [_thoughts_apart(message) for message in messages]
    if apart != list(messages):  # only a template that drops thoughts itself gets them apart
        expected = _apply(chat_form, messages, generate)
        with contextlib.suppress(RefusalError):
            text = _render(chat_form, apart, marks, generate)
            if any_mark.sub("", text) == expected:
                return text, any_mark
    return _render(chat_form, messages, marks, generate), any_mark


def control_runs(
    text: str, marks: re.Pattern[str], control: Mapping[str, tuple[int, AddedToken]]
) -> Iterator[str | int]:
    """A marked text as its control tokens' ids and the runs of text between them, marks taken out.

    Text comes in whole runs, so that tokens fall as they do when the model's own tokenizer reads it all.
    """
    longest_first = sorted(control, key=len, reverse=True)
    splitter = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    place, before = 0, None
    for found in [*splitter.finditer(text), None]:
        run = marks.sub("", text[place : found.start() if found else len(text)])
        number, token = control[found[0]] if found else (0, None)
        run = run.lstrip() if before and before.rstrip else run
        run = run.rstrip() if token and token.lstrip else run
        if run:
            yield run
        if found:
            yield number
            place, before = found.end(), token


def with_system_prompt(template: str, system: str, has_role: bool = True) -> str:
    """A chat template in which `system` stands when the messages bring no system message of their own.

    has_role: whether the template knows one; otherwise the system's text comes to the head of the first message.
    """
    literal = system.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n")
    if not has_role:
        return (
            "{% if messages and messages[0]['role'] == 'system' %}"
            "{% set pkv_system, pkv_turns = messages[0]['content'], messages[1:] %}"
            f'{{% else %}}{{% set pkv_system, pkv_turns = "{literal}", messages %}}{{% endif %}}'
            "{% if pkv_turns %}{% set pkv_first = pkv_system + '\\n\\n' + pkv_turns[0]['content'] %}"
            "{% set messages = [{'role': pkv_turns[0]['role'], 'content': pkv_first}] + pkv_turns[1:] %}{% endif %}"
            f"{template}"
        )
    message = f'{{"role": "system", "content": "{literal}"}}'
    guard = "not messages or messages[0]['role'] != 'system'"
    return f"{{% if {guard} %}}{{% set messages = [{message}] + messages %}}{{% endif %}}{template}"


def _render(chat_form: Any, messages: Messages, marks: Sequence[str], generate: bool) -> str:
    """The template's text: each message's content in marks of its own, exactly once, and other fields in the last."""
    fenced = [
        {key: text if key == "role" else _fence(text, mark if key == "content" else marks[-1]) for key, text in each}
        for each, mark in zip((message.items() for message in messages), marks, strict=False)
    ]
    text = _apply(chat_form, fenced, generate)
    for message, mark in zip(fenced, marks, strict=False):
        if text.count(mark) != message["content"].count(mark):
            raise RefusalError(f"it does not show the {message['role']} message as it is")
    return text


def _apply(chat_form: Any, messages: Messages, generate: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return chat_form.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise RefusalError(" ".join(str(error).split())[:160]) from error


def _fence(text: str, mark: str) -> str:
    return re.sub(r"\S+", lambda word: mark + mark.join(word[0]) + mark, text)


def _thoughts_apart(message: Mapping[str, str]) -> Mapping[str, str]:
    """An answer and the thoughts before it in a field of their own, as Qwen3's template splits them."""
    pieces = message["content"].split("</think>")
    if message["role"] != "assistant" or len(pieces) == 1:
        return message
    thoughts = pieces[0].rstrip("\n").split("<think>")[-1].strip("\n")
    return {**message, "content": pieces[-1].lstrip("\n"), "reasoning_content": thoughts}
