"""The run directory's records: metrics.jsonl, TensorBoard under tb/, rollouts as Parquet.

A resumed run takes out what it will write again, so that the files are as if it had never been killed. Checkpoints are
`pkv.checkpoint`'s matter.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkv.config import UserError

Metric = float | int | str | None

# TensorBoard's custom-scalars page: the few charts that matter, by tag pattern.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "pkv": {
        "rewards": ["Multiline", ["^reward/"]],
        "accuracy and format": ["Multiline", ["(^|/)accuracy$", "(^|/)format$", "(^|/)competition_format$"]],
        "lengths by fighter, tokens": ["Multiline", ["^length/(pirate|knight|viking|tokens)$"]],
        "copying (overlap)": ["Multiline", ["(^|/)overlap/"]],
        "policy": ["Multiline", ["^policy/", "^loss$"]],
        "tokens per second": ["Multiline", ["^perf/.*tokens_per_s$"]],
        "seconds by phase": ["Multiline", ["^perf/.*_s$(?<!tokens_per_s)"]],
    }
}


class Tracker:
    """Writes one run's records into `run_dir`.

    resume_step: the first step that will be written; lines, charts and rollouts from there on are taken out first.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        metrics = self._run_dir / "metrics.jsonl"
        cut_lines(metrics, resume_step)
        for file in self._run_dir.glob("rollouts/step-*.parquet"):
            if int(file.stem.split("-")[1]) >= resume_step:
                file.unlink()
        self._lines = metrics.open("a", encoding="utf-8")
        charts = self._run_dir / "tb"
        purge_step = resume_step if charts.exists() else None  # TensorBoard forgets what it read from there on
        self._charts = SummaryWriter(str(charts), purge_step=purge_step, flush_secs=10)
        self._charts.add_custom_scalars(LAYOUT)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Append a line to metrics.jsonl and the numbers to TensorBoard; what is not finite is null in the line."""
        plain = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": int(step)} | {k: None if _not_finite(v) else v for k, v in plain.items() if k != "step"}
        self._lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._lines.flush()
        self.scalars(step, {name: value for name, value in plain.items() if name != "step"})

    def scalars(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Send the numbers to TensorBoard only."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._charts.add_scalar(name, value, step)

    def text(self, step: int, tag: str, competition_text: str) -> None:
        """Show a text in TensorBoard, letter by letter as it stands: nothing in it becomes markup, link or image."""
        self._charts.add_text(tag, as_literal_markdown(competition_text), step)
        self._charts.flush()

    def close(self) -> None:
        """Flush everything."""
        self._lines.close()
        self._charts.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_rollouts(run_dir: Path, step: int, rows: Sequence[Mapping[str, Any]], host: int = 0) -> Path:
    """Write a step's rows to rollouts/step-000123.parquet, in one piece; `rollout_table` says the columns.

    Those of a host but the first go to step-000123-host-4.parquet beside it.
    """
    import pyarrow.parquet as parquet

    file = Path(run_dir) / "rollouts" / f"step-{step:06d}{f'-host-{host}' if host else ''}.parquet"
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    parquet.write_table(rollout_table([{"step": step} | dict(row) for row in rows]), partial, compression="zstd")
    os.replace(partial, file)
    return file


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none for a missing file. A last line that is still being written is passed over.

    Only a newline ends a line: `splitlines` knows others, which JSON leaves as they are. Raises UserError.
    """
    if not file.is_file():
        return []
    found = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{file}:{number}: expected a JSON object; mend or remove the line") from error
        if isinstance(value, dict):
            found.append(value)
    return found


def cut_lines(file: Path, step: int) -> None:
    """Take the lines whose "step" is at least `step` out of a JSONL file; see `keep_lines`."""
    keep_lines(file, lambda line: line["step"] < step)


def keep_lines(file: Path, wanted: Callable[[Any], bool]) -> None:
    """Leave in a JSONL file the lines that are `wanted`, and not a last one that was torn by a kill.

    The file is replaced in one piece; a missing one stays missing. Raises UserError for another unreadable line.
    """
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or torn
        try:
            if wanted(json.loads(line)):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number}: expected a JSON object with a step; mend or remove the line") from error
    write_whole(file, "".join(kept))


def write_whole(file: Path, text: str) -> None:
    """Write a file in one piece: whoever is killed meanwhile leaves the old one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def rollout_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a pyarrow table.

    Plain columns: step, round, problem_id, question, gold, sample, text, total, errors (codes), finish, tokens,
    policy_step, and any other key of the rows. The mappings `rewards` and `advantages` become a column for each entry,
    `reward/<name>` and `advantage/<owner>`; `facts` becomes JSON text. What a row lacks is null.
    """
    import pyarrow as pa

    flat = [_flat_row(row) for row in rows]
    kinds = {
        **dict.fromkeys(("round", "problem_id", "question", "gold", "text", "finish", "facts"), pa.string()),
        **dict.fromkeys(("step", "sample", "policy_step"), pa.int64()),
        "total": pa.float64(),
        "errors": pa.list_(pa.string()),
    }
    names = list(dict.fromkeys([*kinds, *(name for row in flat for name in row)]))
    columns = {}
    for name in names:
        kind = pa.float64() if name.startswith(("reward/", "advantage/")) else kinds.get(name)
        columns[name] = pa.array([row.get(name) for row in flat], kind)
    return pa.table(columns)


def as_literal_markdown(text: str) -> str:
    """Markdown that shows `text` as it stands: every sign that could mean something is written as its number."""
    # One paragraph with hard breaks: no line can start a block. Control characters would clash with the converter's.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "�", text.replace("\r\n", "\n"))
    text = re.sub(r"[!-/:-@\[-`{-~\t]", lambda sign: f"&#{ord(sign[0])};", text)
    text = re.sub(r"(?m)(?<= ) |^ ", "&#160;", text)
    return text.replace("\n", "<br>")


def _flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name not in ("rewards", "advantages", "facts")}
    for prefix, key in (("reward", "rewards"), ("advantage", "advantages")):
        flat |= {f"{prefix}/{name}": _plain(value) for name, value in (row.get(key) or {}).items()}
    if row.get("facts") is not None:
        flat["facts"] = json.dumps(row["facts"], ensure_ascii=False, default=_plain)
    return flat


def _plain(value: Any) -> Any:
    """A numpy or jax scalar (or array) as Python's own; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
