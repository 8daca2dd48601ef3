"""A policy from anywhere: a Hugging Face directory, a hub id, or the newest checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from pkv import checkpoint
from pkv.competition import Tokenizer, system_prompt
from pkv.config import UserError
from pkv.mesh import TRAINING_RULES, fold, shardings
from pkv.model import Arch, Params, init_params, load_params, param_axes, param_shapes, read_arch

RUN_MODEL = "model"  # of a run directory: config.json and tokenizer, so that the run is a MODEL by itself
SYSTEM_FILE = "system_prompt.txt"


@dataclass(frozen=True)
class Policy:
    """What answers: architecture, weights (float32, laid out for training), tokenizer, system prompt, policy step."""

    arch: Arch
    params: Params
    tokenizer: Tokenizer
    system: str
    step: int = 0


def load_policy(
    source: str,
    mesh: Mesh,
    *,
    system: str | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
) -> Policy:
    """The policy at `source`. system: a prompt's name or path; None takes the one that the source was trained with,
    or "competition". init "random" draws weights for the source's architecture. Raises UserError.
    """
    run = Path(source)
    if (run / "checkpoints").is_dir():
        return _load_run(run, mesh, system)
    arch = read_arch(source)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.vocab_size}")
    if init == "random":
        params = init_params(arch, fold(jax.random.key(seed), "weights"), mesh=mesh)
    else:
        params = load_params(source, arch, shardings=_placing(arch, mesh))
    return Policy(arch, params, tokenizer, _system_of(run, system))


def _load_run(run: Path, mesh: Mesh, system: str | None) -> Policy:
    step = checkpoint.latest(run / "checkpoints")
    if step is None:
        raise UserError(f"{run}: this run has no whole checkpoint yet; train on, or name another model")
    model = run / RUN_MODEL
    arch = read_arch(str(model))
    params, _ = checkpoint.restore(run / "checkpoints", step, _template(arch, mesh), under="params")
    return Policy(arch, params, Tokenizer.load(str(model)), _system_of(model, system), step)


def _template(arch: Arch, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        param_shapes(arch),
        _placing(arch, mesh),
    )


def _placing(arch: Arch, mesh: Mesh) -> Any:
    return shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)


def _system_of(directory: Path, name: str | None) -> str:
    if name is None and (directory / SYSTEM_FILE).is_file():
        return (directory / SYSTEM_FILE).read_text(encoding="utf-8")
    return system_prompt(name or "competition")
