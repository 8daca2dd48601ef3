"""What each choice of the trainer does to learning: `python benchmarks/evidence.py OUT [--seeds 0 1] [--only NAME]`.

Runs the tiny config, shortened, from one warm-up a seed, in variants that differ in one thing each; every run is a run
directory under OUT, and a run that is there is gone on with, or only read. Prints a table of the evaluations after the
warm-up and after the last round, a cell's values by seed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from pkv.records import FIGHTERS
from pkv.tracking import read_jsonl

STEPS = {"format": 25, "aha": 15, "longer": 30}
GSPO = ("--grpo.loss.surrogate=gspo",)
CISPO = ("--grpo.loss.surrogate=cispo",)
MINIBATCHES = ("--grpo.minibatches=4",)
# What differs from the tiny config's recipe, as flags.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "sequence credit": ("--grpo.credit=sequence", "--grpo.judge_baseline=alike"),
    "unfloored std": ("--grpo.scale=std",),
    "no reflection reward": ("--rounds.aha.weights.reflection=0.0", "--rounds.longer.weights.reflection=0.0"),
    "no copying reward": tuple(f"--rounds.{name}.weights.originality=0.0" for name in STEPS),
    "no length reward": ("--rounds.longer.weights.length=0.0",),
    "judge against its like": ("--grpo.judge_baseline=alike",),
    "GSPO": GSPO,
    "CISPO": CISPO,
    "Dr.GRPO": ("--grpo.loss.normalise=constant", "--grpo.scale=none"),
    "GRPO": ("--grpo.loss.normalise=sequences", "--grpo.scale=std"),
    "leave one out": ("--grpo.baseline=leave_one_out",),
    # On policy every ratio is 1, and the surrogates are one; in minibatches all but the first of a step are off it.
    "minibatches": MINIBATCHES,
    "GSPO, minibatches": (*MINIBATCHES, *GSPO),
    "CISPO, minibatches": (*MINIBATCHES, *CISPO),
}
SHOWN = {
    "right %": ("{:.0f}", 100, ("accuracy",)),
    "tags in order %": ("{:.0f}", 100, ("format",)),
    "fighters' own answers": ("{:.2f}", 1, tuple(f"reward/fighter_correctness_{name}" for name in FIGHTERS)),
    "reflection": ("{:.3f}", 1, tuple(f"reward/reflection_{name}" for name in FIGHTERS)),
    "judge right where fighters disagree %": ("{:.0f}", 100, ("reward/judge_accuracy",)),
    "judge's lift": ("{:+.2f}", 1, ("judge/lift",)),
    "position bias": ("{:.2f}", 1, ("judge/position_bias",)),
    "knight's overlap": ("{:.2f}", 1, ("overlap/knight",)),
    "viking's overlap": ("{:.2f}", 1, ("overlap/viking",)),
    "tokens": ("{:.0f}", 1, ("length/tokens",)),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    arguments.add_argument("--table", action="store_true", help="read what is there, run nothing")
    chosen = arguments.parse_args()
    for seed in () if chosen.table else chosen.seeds:
        model = warmed_up(chosen.out, seed)
        for name in chosen.only:
            steps = [f"--rounds.{round_}.steps={count}" for round_, count in STEPS.items()]
            start = [f"--model.path={model}", "--model.init=pretrained", "--warmup.steps=0"]
            pkv(
                "train",
                "tiny",
                "--run",
                run_of(chosen.out, name, seed),
                f"--seed={seed}",
                *start,
                *steps,
                *VARIANTS[name],
            )
    print("| | " + " | ".join(SHOWN) + " |\n" + "|---" * (1 + len(SHOWN)) + "|")
    print(
        row("after the warm-up", [evaluation(chosen.out, "as shipped", seed, "before format") for seed in chosen.seeds])
    )
    for name in chosen.only:
        print(row(name, [evaluation(chosen.out, name, seed, "after longer") for seed in chosen.seeds]))


def warmed_up(out: Path, seed: int) -> Path:
    """The model after the warm-up of a seed, in Hugging Face's form."""
    run, model = out / f"warm-up-{seed}", out / f"model-{seed}"
    if not model.exists():
        pkv("train", "tiny", "--run", run, f"--seed={seed}", *(f"--rounds.{name}.steps=0" for name in STEPS))
        pkv("export", run, model)
    return model


def run_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def pkv(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pkv", *map(str, words)], check=True)


def evaluation(out: Path, name: str, seed: int, which: str) -> dict[str, float] | None:
    """One evaluation of a run, None of a run that isn't there or hasn't come so far."""
    lines = read_jsonl(run_of(out, name, seed) / "evaluations.jsonl")
    return next((line["metrics"] for line in lines if line["name"] == which), None)


def row(name: str, found: list[dict[str, float] | None]) -> str:
    cells = []
    for form, factor, keys in SHOWN.values():
        there = [one for one in found if one is not None and one.keys() >= set(keys)]  # an older run may lack a measure
        values = [factor * statistics.mean(one[key] for key in keys) for one in there]
        cells.append(", ".join(map(form.format, values)))
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
