"""What each choice of the trainer does to learning: `python benchmarks/evidence.py OUT [--seeds 0 1] [--only NAME]`.

Runs the tiny config, shortened, from one warm-up a seed, in variants that differ in one thing each; every run is a run
directory under OUT, and a run that is there is gone on with, or only read. Prints a table of the last evaluations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

STEPS = {"format": 25, "aha": 15, "longer": 30}
# What differs from the tiny config's recipe, as flags.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "sequence credit": ("--grpo.credit=sequence",),
    "unfloored std": ("--grpo.scale=std",),
    "no reflection reward": ("--rounds.aha.weights.reflection=0.0", "--rounds.longer.weights.reflection=0.0"),
    "no copying reward": tuple(f"--rounds.{name}.weights.originality=0.0" for name in STEPS),
    "no length reward": ("--rounds.longer.weights.length=0.0",),
    "GSPO": ("--grpo.loss.surrogate=gspo", "--grpo.loss.clip_low=3e-4", "--grpo.loss.clip_high=4e-4"),
    "CISPO": ("--grpo.loss.surrogate=cispo",),
    "Dr.GRPO": ("--grpo.loss.normalise=constant", "--grpo.scale=none"),
    "GRPO": ("--grpo.loss.normalise=sequences", "--grpo.scale=std"),
    "leave one out": ("--grpo.baseline=leave_one_out",),
}
SHOWN = {
    "right %": ("accuracy", 100),
    "tags %": ("format", 100),
    "fighters right": ("reward/fighter_correctness_pirate", 1),
    "reflection": ("reward/reflection_pirate", 1),
    "viking's overlap": ("overlap/viking", 1),
    "tokens": ("length/tokens", 1),
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
    for name in chosen.only:
        print(f"\n{name}\n{'':<22}" + "".join(f"{label:>18}" for label in SHOWN))
        for seed in chosen.seeds:
            file = run_of(chosen.out, name, seed) / "evaluations.jsonl"
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
                print(row(seed, json.loads(line)))


def warmed_up(out: Path, seed: int) -> Path:
    """The model after the warm-up of a seed, in Hugging Face's form."""
    run, model = out / f"warm-up-{seed}", out / f"model-{seed}"
    if not model.exists():
        pkv("train", "tiny", "--run", run, f"--seed={seed}", *(f"--rounds.{name}.steps=0" for name in STEPS))
        pkv("export", run, model)
    return model


def run_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '-')}-{seed}"


def pkv(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pkv", *map(str, words)], check=True)


def row(seed: int, evaluation: dict) -> str:
    metrics = evaluation["metrics"]
    cells = (metrics.get(key, float("nan")) * factor for key, factor in SHOWN.values())
    return f"seed {seed}, {evaluation['name']:<14}" + "".join(f"{cell:>18.3g}" for cell in cells)


if __name__ == "__main__":
    main()
