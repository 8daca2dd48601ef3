"""The construct: its tags and layout, the parser that takes a trace apart, the system prompt, the tokenizer. No jax."""

from pkv.competition.chat_text import with_system_prompt
from pkv.competition.construct import TAGS, compose, is_exact_layout, tags_in_order
from pkv.competition.parser import TagReport, parse, split_tokens, tag_leaks, tag_report, trace_tags
from pkv.competition.prompt import render, system_prompt
from pkv.competition.tokenizer import Tokenizer
from pkv.competition.train_tokenizer import train_tokenizer
from pkv.competition.watch import block_budget, stop_strings, together

__all__ = [
    "TAGS",
    "TagReport",
    "Tokenizer",
    "block_budget",
    "compose",
    "is_exact_layout",
    "parse",
    "render",
    "split_tokens",
    "stop_strings",
    "system_prompt",
    "tag_leaks",
    "tag_report",
    "tags_in_order",
    "together",
    "trace_tags",
    "train_tokenizer",
    "with_system_prompt",
]
