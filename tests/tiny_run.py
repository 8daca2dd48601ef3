"""A run of a few thousand weights on eight devices, for tests of the whole loop."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from pkv.competition import train_tokenizer
from pkv.config import WarmupConfig
from pkv.data.arithmetic import problems
from pkv.train.demonstrations import demonstrate

VARIED = """
def varied(problem, trace):
    return sum(map(ord, trace.text)) % 7 / 7

def rewards():
    return {"varied": ("trace", varied)}
"""


def make_config(folder: Path) -> Path:
    """Write the model's directory and the config of a run, and a reward of the user's own that always varies."""
    draw = random.Random(0)
    texts = [demonstrate(problem, draw, WarmupConfig()) for problem in problems("train", 200)]
    train_tokenizer(texts, 600, folder / "model")
    model = {
        "model_type": "qwen2",
        "vocab_size": 640,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (folder / "model" / "config.json").write_text(json.dumps(model))
    config = {
        "model": {"path": "model", "init": "random"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "prompt": {"system": "brief"},
        "sampling": {"slots": 8, "segment": 8, "page_tokens": 64},
        "rewards": {"workers": 0, "user_files": ["varied.py"]},
        "grpo": {"prompts": 2, "samples": 4, "row_tokens": 512, "micro_rows": 4},
        "warmup": {"steps": 2, "demonstrations": 4, "learning_rate": 1e-2},
        "evaluate": {"problems": 2, "shown": 2},
        "checkpoint": {"every": 1, "keep": 9},
        "rounds": [
            {
                "name": "first",
                "steps": 2,
                "max_new_tokens": 24,
                "weights": {"length": 1.0, "format": 1.0, "varied": 1.0},
            },
            {"name": "second", "steps": 1, "max_new_tokens": 32, "weights": {"length": 1.0, "varied": 1.0}},
        ],
    }
    # What random weights say earns nothing: without a reward that differs nothing would be trained on at all.
    (folder / "varied.py").write_text(VARIED)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"
