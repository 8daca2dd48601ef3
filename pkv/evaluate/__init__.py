"""Rollouts into scored groups, and what groups say about a model: accuracy, format, judge, copying, lengths.

Training and evaluation share the same sampler, prompt, parser and rewards because both come through here.
"""

from pkv.evaluate.groups import Sampled, Source, render_prompts, requests_for, sample_groups, submit
from pkv.evaluate.measures import Evaluation, Row, evaluate, measured, summarise
from pkv.evaluate.policy import MADE_WITH, RUN_MODEL, SYSTEM_FILE, Policy, base_of, load_policy, load_trained

__all__ = [
    "MADE_WITH",
    "RUN_MODEL",
    "SYSTEM_FILE",
    "Evaluation",
    "Policy",
    "Row",
    "Sampled",
    "Source",
    "base_of",
    "evaluate",
    "load_policy",
    "load_trained",
    "measured",
    "render_prompts",
    "requests_for",
    "sample_groups",
    "submit",
    "summarise",
]
