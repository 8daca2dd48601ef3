"""A run's directory: opened anew or gone on with, its config held against what is there, nothing lost.

config.yaml, model/, metrics.jsonl, tb/, rollouts/, evaluations.jsonl, checkpoints/

Several hosts see one directory. The first one writes what there is once; each writes its rollouts, and its part of a
checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from pkv import checkpoint
from pkv.config import Config, RoundConfig, UserError, as_plain
from pkv.evaluate import MADE_WITH, RUN_MODEL, SYSTEM_FILE, Evaluation, Policy, Row, Sampled
from pkv.hosts import gather, leads, share
from pkv.hub import pinned
from pkv.records import Problem, Rollout
from pkv.tracking import Tracker, cut_lines, keep_lines, read_jsonl, write_rollouts, write_whole
from pkv.train.rounds import before
from pkv.train.waiting import as_arrays, from_arrays

# Knobs that change how a run goes, not what it computes: they may differ when it goes on, as rounds to come may.
FREE = ("checkpoint.", "mesh.", "rewards.workers", "evaluate.shown")
MEASURED_BY = ("weights", "length_optimum", "max_new_tokens", "fighter_tokens")  # of the first round, a warm-up
EVALUATIONS = "evaluations.jsonl"
PACKAGES = ("pkv", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


class Run:
    """The files of one run; `step` is how many steps they hold."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step
        self.tracker = Tracker(folder, resume_step=step) if leads() else None
        self.skipped = 0  # steps in a row whose gradient wasn't finite
        self.waiting: Sampled | None = None  # the next step's rollouts, where they are sampled before this one's end
        self._pass_rates: dict[str, float] | None = None
        self._evaluations = folder / EVALUATIONS
        if self.tracker is not None:
            cut_lines(self._evaluations, step + 1)  # one made at this very step is kept
        gather("opened")  # what will be written again is gone before anybody writes

    def restore(self, template: Any) -> Any:
        """The state of the checkpoint that the run goes on from."""
        return checkpoint.restore(self.folder / "checkpoints", self.step, template)[0]

    def save(self, step: int, state: Any, keep: int) -> None:
        """Write a checkpoint after `step` steps, with what waits for the next one."""
        self.step = step
        waiting = as_arrays(self.waiting) if self.waiting else None
        checkpoint.save(self.folder / "checkpoints", step, state, {"step": step}, keep, waiting)

    def kept(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[list[Rollout]]]:
        """The problems, and their rollouts, that waited in the checkpoint that the run goes on from; usually none.

        They are this host's share of what all hosts of then have left.
        """
        left = [
            from_arrays(arrays, problems) for arrays in checkpoint.read_beside(self.folder / "checkpoints", self.step)
        ]
        by_host = [list(zip(*part, strict=True)) for part in left]
        in_turn = [one for turn in itertools.zip_longest(*by_host) for one in turn if one is not None]
        asked, rollouts = zip(*share(in_turn), strict=True) if in_turn else ((), ())
        return list(asked), list(rollouts)

    def log(
        self,
        step: int,
        metrics: Mapping[str, Any],
        rollouts: Sequence[Mapping[str, Any]] = (),
        rows: Sequence[Row] = (),
    ) -> None:
        """Write a step's metrics and this host's rollouts, and remember how all problems fared."""
        if self.tracker is not None:
            self.tracker.log(step, metrics)
        if rollouts:
            write_rollouts(self.folder, step, rollouts, jax.process_index())
        if self._pass_rates is not None:
            self._pass_rates |= measured_pass_rates(rows)

    def show(self, step: int, tag: str, text: str) -> None:
        """A competition for TensorBoard."""
        if self.tracker is not None:
            self.tracker.text(step, tag, text)

    def pass_rates(self) -> dict[str, float]:
        """By problem id, the share of right answers in the last group of each; read from the rollouts at first."""
        if self._pass_rates is None:
            found: dict[str, float] = {}
            for file in sorted((self.folder / "rollouts").glob("step-*.parquet")) if leads() else ():
                found |= stored_pass_rates(file)
            self._pass_rates = dict(gather(found)[0])
        return self._pass_rates

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations so far: {"step", "name", "metrics"}."""
        found = read_jsonl(self._evaluations) if leads() else []  # a shared disk may show others what was there before
        return gather([{name: one[name] for name in ("step", "name", "metrics")} for one in found])[0]

    def add_evaluation(self, step: int, name: str, evaluation: Evaluation, shown: int) -> None:
        """Append an evaluation with its first `shown` answers, and put its numbers beside the training's."""
        samples = []
        for group in evaluation.groups[:shown]:
            problem, trace, card = group.prompt.problem, group.traces[0], group.cards[0]
            samples.append(
                {
                    "question": problem.question,
                    "gold": problem.answer,
                    "completion": trace.text,
                    "final_answer": card.final_answer,
                    "right": card.rewards["correctness"].value == 1.0,
                }
            )
        line = {"step": step, "name": name, "metrics": evaluation.metrics, "samples": samples}
        if self.tracker is not None:
            with self._evaluations.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.tracker.scalars(step, {f"heldout/{key}": value for key, value in evaluation.metrics.items()})

    def close(self) -> None:
        """Flush and close the files."""
        if self.tracker is not None:
            self.tracker.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measured_pass_rates(rows: Sequence[Row]) -> dict[str, float]:
    """By problem id, the share of right final answers among those that could be judged."""
    values: dict[str, list[float | None]] = {}
    for row in rows:
        values.setdefault(row["problem"], []).append(row["rewards"]["correctness"])
    return _shares_right(values)


def stored_pass_rates(file: Path) -> dict[str, float]:
    """The same from a step's rollouts on disk."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(file, columns=["problem_id", "reward/correctness"])
    values: dict[str, list[float | None]] = {}
    for name, value in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
        values.setdefault(name, []).append(value)
    return _shares_right(values)


def _shares_right(values: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    known = {name: [value for value in found if value is not None] for name, found in values.items()}
    return {name: sum(value == 1.0 for value in found) / len(found) for name, found in known.items() if found}


def open_run(config: Config, folder: Path, policy: Policy, model_config: Mapping[str, Any], fresh: bool) -> Run:
    """The run in `folder`: gone on with if it was made by this config, started if there is none, or anew if `fresh`.

    Rounds that haven't begun are taken from this config. Raises UserError for a folder that holds something else, or a
    run made by another config; and where hosts don't see the same one.
    """
    (step, made), *_ = gather(_make(config, folder, policy, model_config, fresh) if leads() else None)
    file = folder / "config.yaml"
    seen = gather(file.is_file() and file.read_text(encoding="utf-8") == made)
    if not all(seen):
        raise UserError(
            f"{folder}: host {seen.index(False)} does not see what host 0 wrote there; name a directory with --run "
            "that all hosts share, such as a network disk or a mounted bucket"
        )
    return Run(folder, step)


def _make(
    config: Config, folder: Path, policy: Policy, model_config: Mapping[str, Any], fresh: bool
) -> tuple[int, str]:
    """Have the run's directory there: the step to go on from, and the text of its config.yaml.

    That text comes first, under another name: so a run that was killed while it began is known and begins again.
    """
    file, beginning = folder / "config.yaml", folder / "config.yaml.partial"
    if _is_run(file) and not fresh:
        step = checkpoint.latest(folder / "checkpoints") or 0
        return step, _gone_on_with(config, file, step)
    if _is_run(file):
        os.replace(file, beginning)
    there = set(folder.iterdir()) if folder.exists() else set()
    if there - {beginning} and not _is_run(beginning):
        raise UserError(f"{folder}: is not empty and holds no run of pkv; name another directory with --run")
    for path in there - {beginning}:  # of a run that is to begin anew, or was killed while it began
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    text = _as_yaml(as_plain(config) | {MADE_WITH: made_with() | {"model": pinned(config.model.path)}})
    beginning.write_text(text, encoding="utf-8")
    model = folder / RUN_MODEL
    model.mkdir()
    (model / "config.json").write_text(json.dumps(dict(model_config), indent=2) + "\n", encoding="utf-8")
    (model / SYSTEM_FILE).write_text(policy.system, encoding="utf-8")
    policy.tokenizer.save(model)
    os.replace(beginning, file)
    return 0, text


def _as_yaml(described: Mapping[str, Any]) -> str:
    return yaml.safe_dump(described, sort_keys=False, allow_unicode=True)


def _is_run(file: Path) -> bool:
    """Whether a config.yaml was written by `open_run`: nothing else may be gone on with, or deleted."""
    if not file.is_file():
        return False
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read; name another directory with --run") from error
    return isinstance(found, dict) and MADE_WITH in found


def _gone_on_with(config: Config, file: Path, step: int) -> str:
    """The text of a run's config.yaml, with the rounds to come as `config` has them. Raises UserError where what has
    begun differs."""
    text = file.read_text(encoding="utf-8")
    made, wanted = yaml.safe_load(text), as_plain(config)
    made = _over(Config(), made | {"rounds": [_over(RoundConfig(), one) for one in made["rounds"]]})
    there, here = (_flat(each | {"rounds": _settled(made, each["rounds"], step)}) for each in (made, wanted))
    if model := there.get(f"{MADE_WITH}.model"):  # a hub id may mean another commit by now
        there["model.path"], here["model.path"] = model, pinned(config.model.path)
    for key in [*here, *there]:
        if key.startswith((*FREE, MADE_WITH)) or there.get(key) == here.get(key):
            continue
        raise UserError(
            f"{file.parent}: was made by another config: {key} is {there.get(key)!r} there and {here.get(key)!r} here; "
            "use --fresh to start anew, or another --run directory"
        )
    if made["rounds"] == wanted["rounds"]:
        return text
    # How a round begins that changes is measured anew.
    begins = lambda one: one["step"] == step and one["name"].startswith(before(""))  # noqa: E731
    keep_lines(file.parent / EVALUATIONS, lambda one: one["step"] <= step and not begins(one))
    text = _as_yaml(made | {"rounds": wanted["rounds"]})
    write_whole(file, text)
    return text


def _settled(made: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """Of `rounds` what may not differ from what a run was made with, after so many steps: those that have begun and,
    until then, what the warm-up is measured by."""
    starts = itertools.accumulate((was["steps"] for was in made["rounds"]), initial=made["warmup"]["steps"])
    begun = [dict(round_) for first, round_ in zip(starts, rounds[: len(made["rounds"])], strict=False) if first < step]
    if begun or not step:
        return begun
    first = rounds[0] if rounds else as_plain(RoundConfig())
    return [{name: first[name] for name in MEASURED_BY}]


def _over(defaults: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of a section and, of knobs that are newer than the run, their defaults; a mapping is one knob."""
    sections = {name: one for name, one in vars(defaults).items() if dataclasses.is_dataclass(one) and name in given}
    return {**as_plain(defaults), **given, **{name: _over(one, given[name]) for name, one in sections.items()}}


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = ((str(index), item) for index, item in enumerate(node))
    else:
        return {path: node}
    return {key: leaf for name, item in items for key, leaf in _flat(item, f"{path}.{name}" if path else name).items()}


def made_with() -> dict[str, str]:
    """Versions of what computes, and the code's revision where git, or PKV_COMMIT in an unpacked archive, says it."""
    found = {name: importlib.metadata.version(name) for name in (*PACKAGES, *ACCELERATORS) if _installed(name)}
    revision = _described() or os.environ.get("PKV_COMMIT", "")[:12]
    return found | ({"git": revision} if revision else {})


def _described() -> str:
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
