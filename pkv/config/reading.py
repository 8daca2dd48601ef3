"""From YAML and flags to a `Config`, and back.

An unknown key, a wrong type or an impossible value is one `ConfigError` that names the path, what was got, what was
expected, and the nearest right name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from pkv.config.knobs import BOUNDS, Config, ConfigError


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and put `--section.key value` (or `--section.key=value`) flags over it.

    `path` is a file, or the name of a shipped config such as "tiny". A round is named by its name or its place:
    `--rounds.format.steps 5`, `--rounds.0.steps 5`. Raises ConfigError.
    """
    path = find_config(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `model:`, got {describe(raw)}")
    for key, value in parse_overrides(overrides):
        set_path(raw, key, value)
    config = parse_config(raw)
    model, rewards = config.model, config.rewards
    model = dataclasses.replace(model, path=_beside(path, model.path))
    rewards = dataclasses.replace(rewards, user_files=tuple(_beside(path, file) for file in rewards.user_files))
    return dataclasses.replace(config, model=model, rewards=rewards)


def _beside(config_file: Path, name: str) -> str:
    """A relative path made absolute, looked up beside the config file first, then from here; what is in neither place
    stays as it is (a hub id, say)."""
    places = (folder / name for folder in (config_file.parent, Path()) if name)
    return next((str(place.resolve()) for place in places if place.exists()), name)


def find_config(path: str | Path) -> Path:
    """The file behind a path or the name of a shipped config. Raises ConfigError."""
    path = Path(path)
    if path.is_file():
        return path
    shipped, name = shipped_configs(), path.name.removesuffix(".yaml")  # a name may have dots in it
    if name in shipped and path.parent in (Path(), Path("configs")):
        return shipped[name]
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; expected a YAML file")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped configs: {', '.join(sorted(shipped))}"
    raise ConfigError(f"{path}: no such config file; {hint}")


def shipped_configs() -> dict[str, Path]:
    """The configs that come with pkv, by name: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent.parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def parse_config(raw: dict[str, Any]) -> Config:
    """A `Config` from nested plain values. Raises ConfigError."""
    config = typing.cast(Config, _build(Config, raw, ""))
    names = [round_.name for round_ in config.rounds]
    for index, name in enumerate(names):
        if not name:
            raise ConfigError(f"rounds.{index}.name: missing; every round needs a name")
        if name == "warm-up":  # the evaluation after it would pass for the round's
            raise ConfigError(
                f"rounds.{index}.name: {name!r} is what the supervised start is called; name it otherwise"
            )
        if name in names[:index]:
            raise ConfigError(f"rounds.{index}.name: {name!r} is used twice; names must differ")
    _check_lora(config)
    _check_grpo(config)
    return config


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    if not lora.rank:
        for field in dataclasses.fields(lora):
            if getattr(lora, field.name) != field.default:
                raise ConfigError(
                    f"model.lora.{field.name}: nothing reads it at rank 0; set model.lora.rank, to 32 say"
                )
    elif not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ConfigError(f"model.lora.targets: expected different names, at least one; got {list(lora.targets)}")
    elif lora.base != "plain" and config.sampling.weights != "plain":
        raise ConfigError(
            f"sampling.weights: model.lora.base is {lora.base}, and is sampled from as it lies; expected plain with it"
        )
    elif config.optimizer.name == "muon":
        raise ConfigError(
            "optimizer.name: muon steps along whole matrices, which LoRA leaves alone; expected adamw with model.lora"
        )


def _check_grpo(config: Config) -> None:
    grpo, loss = config.grpo, config.grpo.loss
    if config.optimizer.name == "muon" and config.optimizer.moments != "float32":
        raise ConfigError(f"optimizer.moments: {config.optimizer.moments} is for adamw; muon keeps its own in float32")
    if grpo.combine == "total" and grpo.credit == "block":
        raise ConfigError("grpo.combine: a total has no owner; expected rewards, or total with credit: sequence")
    if grpo.refills and not grpo.signal:
        raise ConfigError(
            "grpo.refills: nearly every group differs in some reward; name those that must in grpo.signal"
        )
    if 0 < loss.reject <= 1:
        raise ConfigError(f"grpo.loss.reject: expected 0 (off) or more than 1, such as 1.05; got {loss.reject:g}")
    if 0 < loss.dual_clip <= 1:
        raise ConfigError(f"grpo.loss.dual_clip: expected 0 (off) or more than 1, such as 3; got {loss.dual_clip:g}")
    if loss.kl_weight and config.model.init == "random":
        raise ConfigError("grpo.loss.kl_weight: random weights are no reference; expected 0 with model.init: random")
    if config.data.hardest > config.data.easiest:
        raise ConfigError(
            f"data.hardest: expected at most data.easiest, {config.data.easiest:g}; got {config.data.hardest:g}"
        )
    for round_ in config.rounds:
        grows = (*round_.budgets, round_.max_new_tokens)
        if list(grows) != sorted(set(grows)) or grows[0] < 1:
            raise ConfigError(
                f"rounds.{round_.name}.budgets: expected growing numbers below max_new_tokens, "
                f"{round_.max_new_tokens}; got {list(round_.budgets)}"
            )
        if round_.samples == 1:
            raise ConfigError(f"rounds.{round_.name}.samples: expected 0 (grpo.samples) or at least 2; got 1")
        if grpo.overlong_tokens >= min(grows):
            raise ConfigError(
                f"grpo.overlong_tokens: expected less than every budget, {min(grows)} is the smallest; "
                f"got {grpo.overlong_tokens}"
            )


def as_plain(config: Any) -> Any:
    """The config as nested dicts, lists and scalars, ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [as_plain(item) for item in config]
    if isinstance(config, dict):
        return {key: as_plain(value) for key, value in config.items()}
    return config


def parse_overrides(flags: typing.Sequence[str]) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c=x"]` as [("a.b", 1), ("c", "x")]; values are read as YAML scalars. Raises ConfigError."""
    pairs: list[tuple[str, Any]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"{flag!r}: expected a flag such as --section.key value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{flag}: expected a value after it, as in {flag} VALUE")
            text = rest.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag}: cannot read the value {text!r}") from error
        pairs.append((key.replace("-", "_"), value))
    return pairs


def set_path(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted path inside nested plain values; lists go by index or by an item's `name`. Raises ConfigError."""
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        node = _child(node, part, ".".join(parts[: depth + 1]))
    if isinstance(node, list):
        index = _index(node, parts[-1], key)
        node[index] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise ConfigError(f"{key}: {'.'.join(parts[:-1])} is {describe(node)}, which has no settings inside")


def _child(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, path)]
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: nothing can be set inside {describe(node)}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(items: list[Any], part: str, path: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names) or "none"
    raise ConfigError(f"{path}: no such item {part!r}; there are {len(items)}: {known}")


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value` as a `kind`, checked; `path` is where it stands."""
    if dataclasses.is_dataclass(kind):
        return _build_section(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: expected one of {', '.join(map(str, arguments))}; got {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {describe(value)}")
        return tuple(_build(arguments[0], item, f"{path}.{index}") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected `name: value` lines, got {describe(value)}")
        return {str(key): _build(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _build(inner[0], value, path)
    return _build_scalar(kind, value, path)


def _build_section(kind: type, value: Any, path: str) -> Any:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'config'}: expected a section with keys, got {describe(value)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            raise ConfigError(f"{_join(path, key)}: unknown key; {_suggest(str(key), names, path)}")
    return kind(**{key: _build(hints[key], item, _join(path, key)) for key, item in value.items()})


def _build_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path}: expected {_KIND_WORDS[kind]}, got {describe(value)}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{path}: expected {_KIND_WORDS[kind]}, got {value!r}")
    least, greatest = BOUNDS.get(_star(path), (-math.inf, math.inf))
    if isinstance(value, (int, float)) and not least <= value <= greatest:
        bound = f"at least {least:.10g}" if value < least else f"at most {greatest:.10g}"
        raise ConfigError(f"{path}: expected {bound}, got {value!r}")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")
_KIND_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _suggest(key: str, names: list[str], path: str) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {_join(path, near[0])!r}?"
    return f"expected one of {', '.join(names)}"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _star(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def describe(value: Any) -> str:
    """A value in words, for error messages."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a section with {', '.join(map(str, list(value)[:3])) or 'no keys'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"{value!r} ({_KIND_WORDS.get(type(value), type(value).__name__)})"


def half_character(text: str) -> str | None:
    """The first surrogate in a text, None if it has none: JSON can spell half a pair, and no tokenizer takes it."""
    found = _SURROGATE.search(text)
    return found[0] if found else None
