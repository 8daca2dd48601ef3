"""A released model's shape without its weights, for `pkv bench --init random`: config.json and a small tokenizer.

python benchmarks/shape.py Qwen/Qwen2.5-7B OUT
pkv bench sample --model OUT --init random --prompts 8 --samples 8 --max-new-tokens 1024
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from pkv.competition import train_tokenizer
from pkv.plan.models import ALIKE, TABLE

TEXT = ["How many hives make 20 candles, if 3 hives make 5?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(known := yaml.safe_load(TABLE.read_text(encoding="utf-8"))))
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    train_tokenizer(TEXT, 300, asked.out)
    config = ALIKE | known[asked.model] | {"architectures": ["Qwen2ForCausalLM"]}
    (asked.out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
