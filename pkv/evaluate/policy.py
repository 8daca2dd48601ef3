"""A policy from anywhere: a Hugging Face directory, a hub id, or the newest checkpoint of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import yaml
from jax.sharding import Mesh

from pkv import checkpoint
from pkv.competition import Tokenizer, system_prompt
from pkv.config import Config, MeshConfig, ModelConfig, UserError, parse_config
from pkv.mesh import TRAINING_RULES, fold, make_mesh, shardings
from pkv.model import (
    BLOCK,
    Arch,
    Params,
    freezer,
    init_adapters,
    init_params,
    join,
    load_params,
    param_axes,
    param_shapes,
    read_arch,
)

RUN_MODEL = "model"  # of a run directory: config.json and tokenizer, so that the run is a MODEL by itself
SYSTEM_FILE = "system_prompt.txt"
MADE_WITH = "made_with"  # of a run's config.yaml: versions, revision and the model as `pkv.hub.pinned` names it
PRETRAINED = ModelConfig()  # all weights, to be used or trained as they are


@dataclass(frozen=True)
class Policy:
    """What answers: architecture, weights laid out for training, tokenizer, system prompt, policy step.

    What is trained is float32; LoRA's frozen weights are kept as its `base` says. arch: for the model's whole context.
    trained_rows: of a run, the length of the rows that `Arch.for_context` was told in training.
    """

    arch: Arch
    params: Params
    tokenizer: Tokenizer
    system: str
    step: int = 0
    trained_rows: int = 0


def load_policy(
    source: str,
    mesh: Mesh,
    *,
    system: str | None = None,
    model: ModelConfig = PRETRAINED,
    seed: int = 0,
    dtype: str = "float32",
) -> Policy:
    """The policy at `source`. system: a prompt's name or path; None takes the one that the source was trained with,
    or "competition". model, seed: whether weights are drawn for the source's architecture, and whether they are frozen
    with fresh adapters beside them; a run has its own. dtype: of pretrained weights that are not trained any more.
    Raises UserError.
    """
    run = Path(source)
    if (run / "checkpoints").is_dir():
        policy, base = load_trained(run, mesh, system), base_of(run)
        if base is None:
            return policy
        frozen = _load_weights(base.model.path, policy.arch, mesh, base.model, base.seed)
        return dataclasses.replace(policy, params=join(policy.params, frozen))
    arch = read_arch(source, model.context)
    tokenizer = Tokenizer.load(source)
    if tokenizer.text_size > arch.vocab_size:
        raise UserError(
            f"{source}: the tokenizer's text takes {tokenizer.text_size} ids, the model holds only {arch.vocab_size}; "
            "use the tokenizer that the model came with"
        )
    params = _load_weights(source, arch, mesh, model, seed, dtype)
    if model.lora.rank:
        params = join(init_adapters(arch, model.lora, fold(jax.random.key(seed), "adapters"), mesh), params)
    return Policy(arch, params, tokenizer, _system_of(run, system))


def usual_dtype() -> Literal["float32", "bfloat16"]:
    """What this machine computes in unless told otherwise."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def sampling_mesh(source: str) -> Mesh:
    """All devices for one model that is only sampled from: over tensor as far as its sizes allow, then over fsdp.

    So a device holds no more of the weights than it must. Sizes are counted in blocks of 64 where weights may be
    quantised.
    """
    run = Path(source)
    arch = read_arch(str(run / RUN_MODEL) if (run / "checkpoints").is_dir() else source)
    devices = len(jax.devices())
    tensor = math.gcd(devices, arch.heads, _blocks(arch.ffn), arch.vocab_size)  # the engine repeats key-value heads
    fsdp = math.gcd(devices // tensor, _blocks(arch.hidden))
    return make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))


def _blocks(size: int) -> int:
    return size // math.gcd(size, BLOCK)


def load_trained(run: Path, mesh: Mesh, system: str | None = None) -> Policy:
    """What the newest checkpoint of a run holds: the whole policy, or its adapters without the frozen weights."""
    step = checkpoint.latest(run / "checkpoints")
    if step is None:
        raise UserError(f"{run}: this run has no whole checkpoint yet; train on, or name another model")
    model, base = run / RUN_MODEL, base_of(run)
    arch = read_arch(str(model))
    if base is None:
        template = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            param_shapes(arch),
            _placing(arch, mesh),
        )
    else:
        template = init_adapters(arch, base.model.lora, jax.random.key(0), mesh)
    params, _ = checkpoint.restore(run / "checkpoints", step, template, under="params")
    rows = 0 if (config := _config_of(run)) is None else config.grpo.row_tokens
    return Policy(arch, params, Tokenizer.load(str(model)), _system_of(model, system), step, rows)


def base_of(run: Path) -> Config | None:
    """Model and seed of a run that trains adapters, of which its checkpoints hold nothing else; None for other runs."""
    config = _config_of(run)
    return config if config is not None and config.model.lora.rank else None


def _config_of(run: Path) -> Config | None:
    """What a run's config says of its model, at the commit that it was trained on, and rows; None for no run."""
    file = run / "config.yaml"
    if not (run / "checkpoints").is_dir() or not file.is_file():
        return None
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = parse_config({name: written[name] for name in ("seed", "model", "grpo") if name in written})
    model = written.get(MADE_WITH, {}).get("model", config.model.path)
    if Path(config.model.path).is_dir():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model))


def _load_weights(source: str, arch: Arch, mesh: Mesh, model: ModelConfig, seed: int, dtype: str = "float32") -> Params:
    """In `dtype`, or frozen as LoRA's `base` says, one weight after the other."""
    dtype, keep = model.dtype if model.lora.rank else dtype, freezer(arch, model.lora.base, mesh)
    if model.init == "pretrained":
        return load_params(source, arch, dtype, _placing(arch, mesh), keep)
    drawn = init_params(arch, fold(jax.random.key(seed), "weights"), dtype, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: keep(jax.tree_util.keystr(path, simple=True, separator="."), weight), drawn
    )


def _placing(arch: Arch, mesh: Mesh) -> Any:
    return shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)


def _system_of(directory: Path, name: str | None) -> str:
    if name is None and (directory / SYSTEM_FILE).is_file():
        return (directory / SYSTEM_FILE).read_text(encoding="utf-8")
    return system_prompt(name or "competition")
