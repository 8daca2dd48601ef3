"""Makes the tiny model's tokenizer again: `python configs/tiny/make_tokenizer.py [DIRECTORY]`.

Trained on synthetic competitions over training problems and on the prompt that configs/tiny.yaml uses.
"""

import random
import sys
from pathlib import Path

from pkv.competition import system_prompt, train_tokenizer
from pkv.config import WarmupConfig
from pkv.data.arithmetic import problems
from pkv.train.demonstrations import demonstrate

VOCABULARY = 896  # at most; what the texts don't need is left out
TIMES = 50  # how often the prompt is said, so that its words become whole tokens


def texts() -> list[str]:
    draw = random.Random(0)
    questions = problems("train", 4096)
    competitions = [demonstrate(problem, draw, WarmupConfig()) for problem in questions]
    return [*(problem.question for problem in questions), *competitions, *[system_prompt("brief")] * TIMES]


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    train_tokenizer(texts(), VOCABULARY, directory)
    print(f"wrote {directory / 'tokenizer.json'}")
