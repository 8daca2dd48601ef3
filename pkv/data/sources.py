"""Opens a SOURCE of problems: the built-in generators, a local file, or a dataset of the Hugging Face hub.

A SOURCE is one of
    arithmetic:train, arithmetic:heldout, with :seed=N,count=N behind it if wanted
    a path to a .jsonl, .json or .parquet file
    org/name[:config][:split] on the hub, or a directory in place of org/name; the split is train unless told otherwise
What the columns mean is decided in columns.py.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkv.config import UnavailableError, UserError
from pkv.data.columns import read_rows
from pkv.records import Problem

# A place for messages ("line 3") and the row that stands there.
Row = tuple[str, Any]

ARITHMETIC_COUNT = {"train": 4096, "heldout": 512}
_FILES = (".jsonl", ".json", ".parquet")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?P<rest>(?::[\w.-]*){0,2})", re.ASCII)
_WHAT_A_SOURCE_IS = "expected arithmetic:train, a .jsonl, .json or .parquet file, or org/name[:config][:split]"


def open_source(source: str, limit: int | None = None) -> list[Problem]:
    """The problems of a SOURCE in its order, at most `limit`. Raises UserError with the place of what is wrong."""
    if limit is not None and limit < 1:
        raise UserError(f"{source}: the limit on problems must be at least 1, got {limit}")
    if source.partition(":")[0] == "arithmetic":
        return _open_arithmetic(source, limit)
    path = Path(source)
    if path.suffix.lower() in _FILES:
        rows = _READERS[path.suffix.lower()](_existing(path))
    elif source.partition(":")[0] and Path(source.partition(":")[0]).is_dir():
        name, _, rest = source.partition(":")
        rows = _dataset_rows(source, name, rest, limit)
    elif match := _HUB.fullmatch(source):
        rows = _dataset_rows(source, match["name"], match["rest"][1:], limit)
    elif path.is_file():
        raise UserError(f"{source}: cannot read {path.suffix or 'a file without an ending'}; {_WHAT_A_SOURCE_IS}")
    else:
        raise UserError(f"{source!r} is no source of problems{_nearest(path)}; {_WHAT_A_SOURCE_IS}")
    problems = read_rows(itertools.islice(rows, limit), source)
    if not problems:
        raise UserError(f"{source}: holds no problems")
    return problems


def _open_arithmetic(source: str, limit: int | None) -> list[Problem]:
    from pkv.data.arithmetic import problems

    _, _, rest = source.partition(":")
    split, _, options = rest.partition(":")
    if split not in ARITHMETIC_COUNT:
        raise UserError(f"{source}: expected arithmetic:train or arithmetic:heldout, got {split!r}")
    numbers = {"seed": 0, "count": ARITHMETIC_COUNT[split] if limit is None else limit}
    for option in options.split(",") if options else ():
        name, _, value = option.partition("=")
        if name not in numbers or not re.fullmatch(r"[0-9]{1,9}", value):
            raise UserError(f"{source}: expected seed=N or count=N, got {option!r}")
        numbers[name] = int(value)
    if numbers["count"] < 1:
        raise UserError(f"{source}: count must be at least 1")
    count = numbers["count"] if limit is None else min(numbers["count"], limit)
    return problems(split, count, numbers["seed"])


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path}: is a directory; {_WHAT_A_SOURCE_IS}")
    raise UserError(f"{path}: no such file{_nearest(path)}")


def _nearest(path: Path) -> str:
    """A hint at the file that was meant, or at the directory that is missing."""
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"line {number}"
            text = _decode(line, path, place)
            if text.strip():
                yield place, _parse_json(text, path, place)


def _json_rows(path: Path) -> Iterator[Row]:
    value = _parse_json(_decode(path.read_bytes(), path, ""), path, "")
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON list of problems, got {type(value).__name__}; one a line is .jsonl")
    for number, row in enumerate(value, 1):
        yield f"item {number}", row


def _decode(raw: bytes, path: Path, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}, {place}" if place else str(path)
        raise UserError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _parse_json(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        at = f"{place or 'line ' + str(getattr(error, 'lineno', 1))}{at}"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{path}, {at}: broken JSON: {reason}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def _dataset_rows(source: str, name: str, rest: str, limit: int | None) -> Iterator[Row]:
    """The rows of a hub dataset or of a directory of its shape. Code of the dataset's own is never run."""
    import datasets
    from datasets.exceptions import DatasetsError

    config, split = _config_and_split(rest)
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        kind = UnavailableError if isinstance(error, ConnectionError) else UserError
        raise kind(f"{source}: cannot load it with `datasets`: {_explain(error)}") from error
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"{source}: expected one split, got {type(loaded).__name__}")
    loaded = loaded if limit is None else loaded.select(range(min(limit, len(loaded))))
    for number, row in enumerate(loaded, 1):
        yield f"row {number}", row


def _config_and_split(rest: str) -> tuple[str, str]:
    """`main:test` is both, `test` a split as it bears a split's usual name, `algebra` a config, `:mine` a split."""
    config, colon, split = rest.partition(":")
    if not colon and config in _SPLITS:
        config, split = "", config
    return config, split or "train"


def _explain(error: Exception) -> str:
    message = _one_line(error)
    if isinstance(error, ConnectionError):
        return f"{message} (is this machine offline? then give a local file or directory)"
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
