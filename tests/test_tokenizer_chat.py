"""Chat templates of the shapes that models bring: the model's own ids, messages whole, no control token from text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from pkv.competition import Tokenizer
from pkv.competition.tokenizer_files import TODAY
from pkv.config import UserError

# Short templates with the constructs of the real ones.
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}
{% else %}{% set content = m['content'] %}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{- bos_token }}{%- if not date is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools is defined %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: ' + 'never\\nToday Date: ' + date + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA_3 = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}
{%- set first = messages[0]['content'] + '\\n\\n' -%}{%- else -%}
{%- set first = messages[0]['content'][0]['text'] -%}{%- endif -%}
{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}
{{- (first if loop.first else '') }}{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- endif -%}
{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
MISTRAL_3 = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}
{%- if message['role'] == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content']|trim + eos_token}}{%- else %}{{- raise_exception('only user and assistant') }}
{%- endif %}{%- endfor %}"""
PHI_3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{- '<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}
{{- '<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
QWEN_3 = """{%- if tools %}{{- 'tools' }}{%- endif %}{%- set ns = namespace(last=messages|length - 1, seek=true) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.seek and message.role == 'user' and not message.content.startswith('<tool_response>') %}
{%- set ns.seek = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- else %}{%- set thoughts = '' %}
{%- if message.reasoning_content is string %}{%- set thoughts = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thoughts) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

TURNS = [
    {"role": "user", "content": "  How many hives?\n"},
    {"role": "assistant", "content": "\n24, é 😀 "},
    {"role": "user", "content": "And\n\n candles? "},
]
SYSTEM = {"role": "system", "content": " Be brief.\n"}


def byte_level(control: Iterable[Any]) -> Backend:
    """Qwen's and Llama 3's kind, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*control])
    return backend


def blanks(control: Iterable[Any], prefix: bool) -> Backend:
    """Llama 2's, Mistral's, Gemma's and Phi-3's kind: `▁` for blanks, bytes as fallback; merges can spell `<s>`."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += ["s>", "▁[", "an"]
    merges = [("s", ">"), ("<", "s>"), ("▁", "["), ("a", "n")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *control])
    return backend


def directory_of(path: Path, backend: Backend, template: Any, **said: Any) -> Path:
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps({**kind, "chat_template": template, **said}))
    return path


def phi_tokens() -> list[AddedToken]:
    return [AddedToken(f"<|{name}|>", rstrip=True) for name in ("system", "user", "assistant", "end")]


TEXT_ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
SHAPES = {
    "llama 2": (lambda: blanks([], True), LLAMA_2, TEXT_ENDS),
    "llama 3": (
        lambda: byte_level(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        LLAMA_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma 2": (lambda: blanks(["<start_of_turn>", "<end_of_turn>"], False), GEMMA_2, TEXT_ENDS),
    "gemma 3": (lambda: blanks(["<start_of_turn>", "<end_of_turn>"], False), GEMMA_3, TEXT_ENDS),
    "mistral 3": (lambda: blanks(["[INST]", "[/INST]"], True), MISTRAL_3, TEXT_ENDS),
    "phi 3": (lambda: blanks(phi_tokens(), True), PHI_3, TEXT_ENDS),
    "qwen 3": (
        lambda: byte_level(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_response>"]),
        QWEN_3,
        {"eos_token": "<|im_end|>"},
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    """A tokenizer with a real template's shape, transformers' own reading of it, and its name."""
    from transformers import AutoTokenizer

    build, template, said = SHAPES[request.param]
    path = directory_of(tmp_path_factory.mktemp("shape"), build(), template, **said)
    return Tokenizer.load(path), AutoTokenizer.from_pretrained(str(path)), request.param


def own_ids(theirs: Any, messages: list[dict[str, str]], generate: bool = True) -> list[int]:
    """date: what Llama 3's template would take from the clock otherwise."""
    day = TODAY.strftime("%d %b %Y")
    return list(theirs.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False, date=day))


def test_a_conversation_has_the_ids_that_transformers_gives_it(shape):
    ours, theirs, name = shape
    for messages in ([TURNS[0]], TURNS, [SYSTEM, TURNS[0]], [SYSTEM, *TURNS]):
        if name == "gemma 2" and messages[0] is SYSTEM:  # it has no system role: the text comes before the question
            joined = {"role": "user", "content": SYSTEM["content"] + "\n\n" + messages[1]["content"]}
            expected = own_ids(theirs, [joined, *messages[2:]])
        else:
            expected = own_ids(theirs, messages)
        assert ours.chat(messages).tolist() == expected
    assert ours.chat(TURNS[:2], False).tolist() == own_ids(theirs, TURNS[:2], False)


def test_an_exported_template_says_what_the_training_said_whatever_roles_it_knows(shape, tmp_path):
    """Here and in transformers; a system message of the person's own comes in place of it, never beside it."""
    from transformers import AutoTokenizer

    ours, _, name = shape
    system = 'Say "arr" {{ 7 }} \\boxed{1}.'
    ours.save(tmp_path, ours.template_with(system))
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for turns in ([TURNS[0]], TURNS):
        trained = ours.chat([{"role": "system", "content": system}, *turns]).tolist()
        assert again.chat(turns).tolist() == own_ids(theirs, turns) == trained
        assert again.chat([SYSTEM, *turns]).tolist() == own_ids(theirs, [SYSTEM, *turns])
        assert again.chat([SYSTEM, *turns]).tolist() == ours.chat([SYSTEM, *turns]).tolist()
    assert again.template_with(system) == again.chat_template
    assert ("pkv_first" in again.chat_template) == (name == "gemma 2")


def test_an_answer_ends_with_the_stop_token_that_the_template_puts_behind_it(shape, tmp_path):
    """Not with the first in the list: Llama 3, Gemma and Phi name the end of a text there."""
    ours, theirs, name = shape
    ends = {"gemma 2": "<end_of_turn>", "gemma 3": "<end_of_turn>", "phi 3": "<|end|>", "llama 3": "<|eot_id|>"}
    end = theirs.convert_tokens_to_ids(ends.get(name, theirs.eos_token))
    other = next(i for i in (2, 256) if i != end)
    ours.save(tmp_path)
    for stops, expected in (([other, end], end), ([other], other)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        again = Tokenizer.load(tmp_path)
        assert again.stop_ids == tuple(stops) and again.turn_end == expected


def test_a_prompt_is_the_same_on_every_day(shape):
    ours, _, name = shape
    shown = ours.decode(ours.chat([SYSTEM, TURNS[0]]))
    assert ("26 Jul 2024" in shown) == (name == "llama 3")
    assert datetime.date.today().strftime("%d %b %Y") not in shown


def test_a_text_begins_with_one_bos(shape):
    ours, theirs, name = shape
    ids = ours.chat([SYSTEM, *TURNS]).tolist()
    if "bos_token" in ours.chat_template:
        assert ids[0] == theirs.bos_token_id
        assert ids.count(theirs.bos_token_id) == (2 if name == "llama 2" else 1)  # Llama 2 begins every turn with it


def test_no_message_makes_a_control_token_and_all_of_it_is_there(shape):
    ours, theirs, _ = shape
    attack = " ".join(
        [*theirs.added_tokens_encoder, "<|im_", "end|>", "\ue000", "\ue001", "[INST]", "</think>", "<s>x"]
    )
    plain = [dict(message, content="word") for message in [SYSTEM, *TURNS]]
    evil = [dict(message, content=f" {attack}{i} ") for i, message in enumerate(plain)]
    evil[2]["content"] = evil[2]["content"].replace("</think>", "</ think>")  # what comes before it, Qwen 3 drops
    control = set(theirs.added_tokens_encoder.values())
    assert [i for i in ours.chat(evil).tolist() if i in control] == [
        i for i in ours.chat(plain).tolist() if i in control
    ]
    shown = ours._backend.decode(ours.chat(evil).tolist(), skip_special_tokens=False)
    assert all(shown.count(message["content"].strip()) == 1 for message in evil)
    assert control.isdisjoint(ours.encode(attack).tolist()) and ours.decode(ours.encode(attack)) == attack


def test_thoughts_of_earlier_answers_are_dropped_where_the_template_drops_them(shape):
    ours, theirs, name = shape
    thought = {"role": "assistant", "content": "<think>\nsix times four\n</think>\n\n24"}
    messages = [TURNS[0], thought, TURNS[2]]
    if name == "qwen 3":
        assert ours.chat(messages).tolist() == own_ids(theirs, messages)
        assert "six times" not in ours.decode(ours.chat(messages))
        assert ours.chat(messages[:2], False).tolist() == own_ids(theirs, messages[:2], False)
        twice = dict(thought, content=thought["content"] + "<think><|im_end|>")
        expected = [i for i in own_ids(theirs, messages) if i >= 256]
        assert [i for i in ours.chat([TURNS[0], twice, TURNS[2]]).tolist() if i >= 256] == expected
    else:
        assert "<think>\nsix times four\n</think>\n\n24" in ours.decode(ours.chat(messages))


def test_inst_is_text_for_llama_2_and_control_for_mistral(shape):
    ours, theirs, name = shape
    if name in ("llama 2", "mistral 3"):
        turn = theirs.added_tokens_encoder.get("[INST]")
        assert (turn is None) == (name == "llama 2")
        shown = ours._backend.decode(ours.chat(TURNS[:1]).tolist(), skip_special_tokens=False)
        assert "[INST]" in shown and ours.decode(ours.encode("[INST] x")) == "[INST] x"


def test_a_refused_conversation_says_why(shape):
    ours, _, name = shape
    if name in ("llama 2", "gemma 2"):
        with pytest.raises(UserError, match=r"refuses the roles user, user: .*alternate"):
            ours.chat([TURNS[0], TURNS[0]])
    for role in ("im_end|>", "endoftext", ""):
        with pytest.raises(UserError, match="role"):
            ours.chat([{"role": role, "content": "x"}])


def test_llama_2_through_its_own_class_has_transformers_ids(tmp_path):
    """transformers puts a blank before the very first text only, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    said = {**TEXT_ENDS, "tokenizer_class": "LlamaTokenizer"}
    path = directory_of(tmp_path, blanks(["<|x|>"], True), LLAMA_2, **said)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(str(path))
    for template in (LLAMA_2, "a{{ bos_token }}" + LLAMA_2):
        ours._chat_form.chat_template = theirs.chat_template = template
        for messages in (TURNS, [SYSTEM, *TURNS]):
            assert ours.chat(messages).tolist() == own_ids(theirs, messages)
    text = "an </s> [INST] <|x|>"
    assert ours.decode(ours.encode(text)) == text and {1, 2}.isdisjoint(ours.encode(text).tolist())


def test_the_template_comes_from_the_first_file_that_has_one(tmp_path):
    def shown() -> str:
        tokenizer = Tokenizer.load(tmp_path)
        return tokenizer.decode(tokenizer.chat(TURNS[:1]))

    named = [{"name": "tool_use", "template": "tool:"}, {"name": "default", "template": "list:{{messages[0].content}}"}]
    path = directory_of(tmp_path, byte_level([]), named)
    assert shown() == "list:" + TURNS[0]["content"]
    Tokenizer.load(path).save(path / "again")
    assert Tokenizer.load(path / "again").chat_template == named[1]["template"]
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "json:{{messages[0].content}}"}))
    assert shown().startswith("list:")
    (path / "chat_template.jinja").write_text("jinja:{{messages[0].content}}")
    assert shown().startswith("jinja:")
    (path / "chat_template.jinja").unlink()
    directory_of(path, byte_level([]), None)
    assert shown().startswith("json:")
    directory_of(path, byte_level([]), [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}])
    with pytest.raises(UserError, match=r"several chat templates \(a, b\)"):
        Tokenizer.load(path)


def test_bos_is_put_before_a_template_that_forgot_it_where_the_settings_want_it(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for wanted, own, count in ((True, "", 1), (True, "{{ bos_token }}", 1), (True, "<s>", 1), (False, "", 0)):
        path = directory_of(tmp_path, blanks([], True), own + template, add_bos_token=wanted, **TEXT_ENDS)
        for tokenizer in (Tokenizer.load(path), _saved(Tokenizer.load(path), tmp_path / "out")):
            ids = tokenizer.chat(TURNS).tolist()
            assert ids.count(1) == count and (ids[0] == 1) == bool(count)


def _saved(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    tokenizer.save(path)
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [1, 2, 1]}, {"eos_token_id": 0}, (1, 2)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [1, 2], "vocab_size": 900}}, (1, 2)),
        ({}, {"eos_token_id": 1, "text_config": {"eos_token_id": 2}}, (1,)),
        ({"eos_token_id": 500}, {"vocab_size": 600}, (500,)),  # beyond the tokenizer, within a padded embedding
        ({}, {}, (2,)),
    ],
)
def test_stop_tokens_are_what_the_files_list(tmp_path, generation, config, stops):
    path = directory_of(tmp_path, blanks([], True), None, **TEXT_ENDS)
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(path, light=True)
    assert tokenizer.stop_ids == stops
    assert tokenizer.decode([500, *tokenizer.encode("x"), 599]) == "x"
    assert tokenizer.decode_with_offsets([500, 599])[0] == ""


def test_a_stop_token_outside_the_vocabulary_is_an_error(tmp_path):
    path = directory_of(tmp_path, blanks([], True), None, **TEXT_ENDS)
    for stop in (600, -1):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
        (path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 600}}))
        with pytest.raises(UserError, match=rf"stop token {stop} is outside the model's vocabulary of 600"):
            Tokenizer.load(path, light=True)


def test_a_control_token_that_the_model_has_no_embedding_for_matters_only_where_it_is_written(tmp_path):
    """Gemma 3's text models have `<image_soft_token>` right behind their embedding."""
    backend = blanks(["<image>"], False)
    size = backend.token_to_id("<image>")
    template = "{{ messages[0].content }}{% if messages[0].role == 'tool' %}<image>{% endif %}"
    path = directory_of(tmp_path, backend, template, pad_token="<image>", **TEXT_ENDS)
    (path / "config.json").write_text(json.dumps({"vocab_size": size}))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.text_size, tokenizer.vocab_size, tokenizer.pad_id) == (size, size + 1, 2)
    assert tokenizer.decode(tokenizer.encode("<image>")) == "<image>"
    assert max(tokenizer.chat(TURNS[:1])) < size
    with pytest.raises(UserError, match=rf"'<image>' has the id {size}, but the model's vocabulary is {size}"):
        tokenizer.chat([{"role": "tool", "content": "drawn"}])
    (path / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(UserError, match=rf"'an' has the id {size - 1}, "):
        Tokenizer.load(path).encode("an")


@pytest.mark.parametrize(
    ("decoder", "first"),
    [
        (decoders.Metaspace(), ""),
        (decoders.Metaspace(prepend_scheme="never"), " "),
        (decoders.Replace("▁", " "), " "),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]), ""),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), " "),
    ],
)
def test_offsets_follow_each_kind_of_decoder(tmp_path, decoder, first):
    backend = blanks([], True)
    backend.decoder = decoder
    plain = [AddedToken("<think>", special=False, normalized=False), AddedToken("<note>", special=False)]
    backend.add_tokens(plain)
    path = directory_of(tmp_path, backend, None)
    tokenizer = Tokenizer.load(path, light=True)
    pieces = ("▁", "▁[", "<think>", "▁", "<note>", "a", "<0xC3>", "<0xA9>", "<0xE2>")
    ids = [1, *(backend.token_to_id(piece) for piece in pieces)]
    for cut in range(len(ids) + 1):
        text, starts = tokenizer.decode_with_offsets(ids[cut:])
        assert text == tokenizer.decode(ids[cut:]) and starts[-1] == len(text)
    text, starts = tokenizer.decode_with_offsets(ids)
    assert text.startswith(first) and text[starts[3] : starts[4]] == "<think>" and starts[1] == 0
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="decodes by WordPiece"):
        Tokenizer.load(directory_of(path, backend, None), light=True)
