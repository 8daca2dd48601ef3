"""The table of parity: how far pkv's decoder is from transformers' torch models, by family and feature.

    python benchmarks/parity.py

Every row is a tiny random model made on the spot (tests/golden/make.py), compared in 32 bits on the CPU. Differences
are relative to the largest number there is; greedy is the share of 2 times 64 tokens that differ. Needs torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden.compare import compare
from golden.make import CASES, answers, make_model, save


def main() -> None:
    titles: list[str] = []
    for family, cases in CASES.items():
        for case, changes in cases.items():
            model = make_model(family, changes, seed=7)
            said = answers(model, seed=8)
            with TemporaryDirectory() as directory:
                save(model, Path(directory))
                found = compare(Path(directory), said)
            if not titles:
                titles = list(found)
                print("| family | case | " + " | ".join(titles) + " |\n|---|---|" + "---|" * len(titles))
            print(f"| {family} | {case} | " + " | ".join(f"{found[title]:.1e}" for title in titles) + " |", flush=True)


if __name__ == "__main__":
    main()
