"""A model that was trained here as a Hugging Face directory that other programs load; no training state in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import yaml

from pkv.competition import Tokenizer
from pkv.config import MeshConfig, ModelConfig, UserError
from pkv.evaluate import RUN_MODEL, SYSTEM_FILE, Policy, base_of, load_policy, load_trained
from pkv.hub import name_and_revision
from pkv.mesh import make_mesh
from pkv.model import read_config, save_adapter, save_params
from pkv.tracking import read_jsonl

TEMPERATURE = 0.5  # recommended for chat


def export(
    run_or_model: str, out: str | Path, dtype: Literal["float32", "bfloat16"] = "float32", merge_lora: bool = False
) -> Path:
    """Write OUT: weights, config, tokenizer with the system prompt in its chat template, and a model card.

    float32 keeps every bit of the training's weights. Of a LoRA run the weights are its adapter, for PEFT, or with
    `merge_lora` the base as it was kept in training with the adapter added to it: the very model that was measured.
    Raises UserError when OUT holds anything, and where there is nothing to merge or no base to name.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty directory; choose another")
    source = Path(run_or_model)
    base = _base_apart(run_or_model, merge_lora)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # a stopped export leaves no directory that looks whole
    if partial.exists():
        shutil.rmtree(partial)
    config = read_config(source / RUN_MODEL if (source / "checkpoints").is_dir() else run_or_model)
    host = _host()
    with jax.default_device(host):
        mesh = make_mesh(MeshConfig(), [host])
        policy = load_policy(run_or_model, mesh) if base is None else load_trained(source, mesh)
        if base is None:
            save_params(policy.params, policy.arch, partial, config, dtype)
        else:
            save_adapter(policy.params, policy.arch, partial, config, base.lora, base.path, dtype)
    policy.tokenizer.save(partial, policy.tokenizer.template_with(policy.system))
    _write(partial / "generation_config.json", json.dumps(generation_config(policy.tokenizer), indent=2) + "\n")
    _write(partial / SYSTEM_FILE, policy.system)
    _write(
        partial / "README.md", model_card(source, policy, out.resolve().name, base and name_and_revision(base.path)[0])
    )
    partial.replace(out)
    return out


def _host() -> Any:
    """The host as a device: an export needs memory for the model once, and not an accelerator's. Raises UserError."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("export: works in the host's memory; add cpu to JAX_PLATFORMS") from error


def _base_apart(run_or_model: str, merge_lora: bool) -> ModelConfig | None:
    """The base that a LoRA run's adapter is written without; None where a whole model is written. Raises UserError."""
    config = base_of(Path(run_or_model))
    if config is None and merge_lora:
        raise UserError(f"{run_or_model}: has no adapter to merge; leave --merge-lora out")
    if config is None or merge_lora:
        return None
    if config.model.init == "random":
        raise UserError(f"{run_or_model}: its base was drawn at random, so that nobody else has it; use --merge-lora")
    path, context = config.model.path, config.model.context
    if context and read_config(path, context) != read_config(path):
        raise UserError(
            f"{run_or_model}: its base was stretched to {context} positions (model.context), which an "
            "adapter can't tell; use --merge-lora"
        )
    return config.model


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """How the model wants to be sampled, for transformers and vLLM."""
    return {"do_sample": True, "temperature": TEMPERATURE, **tokenizer.ends}


def model_card(source: Path, policy: Policy, name: str, base: str | None = None) -> str:
    """The README of an exported model: what it does, how to ask it, how it was made, what was measured.

    base: of an adapter, the model that it belongs to.
    """
    kind = "library_name: transformers" if base is None else f"library_name: peft\nbase_model: {_short(base)}"
    parts = [_CARD.format(kind=kind, name=name, temperature=TEMPERATURE)]
    if (source / "config.yaml").is_file():
        recipe = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
        text = yaml.safe_dump(_without_places(recipe), sort_keys=False, allow_unicode=True)
        parts.append(f"## Recipe\n\n{policy.step} steps of pkv with this configuration:\n\n```yaml\n{text}```\n")
    measured = _measured(source / "evaluations.jsonl", policy.step)
    parts.append(measured or "## Results\n\nNothing was measured before this export.\n")
    return "\n".join(parts)


_CARD = """---
{kind}
pipeline_tag: text-generation
tags: [pkv, grpo]
---

# {name}

This model answers by competition. A pirate, a knight and a viking each solve the question; a judge compares the three,
verifies the winner's work and names one winner; then comes a short professional answer, after `</competition>`. Show
that last part to the person who asked.

The chat template puts in the system prompt that the model was trained with (`system_prompt.txt`) unless the messages
bring one of their own. Recommended temperature: {temperature}.
"""


def _measured(file: Path, step: int) -> str:
    """A table of the held-out evaluations up to a step, one column each; "" without any."""
    lines = [line for line in read_jsonl(file) if line["step"] <= step]
    names = sorted({name for line in lines for name in line["metrics"]})
    if not names:
        return ""
    head = ["held-out problems", *(f"{line['name']} (step {line['step']})" for line in lines)]
    rows = [head, ["---"] * len(head)]
    for name in names:
        values = [line["metrics"].get(name) for line in lines]
        rows.append([f"`{name}`", *("" if value is None else f"{value:.3f}" for value in values)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## Results\n\nMeasured by the run itself.\n\n{table}\n"


def _without_places(node: Any) -> Any:
    """A config in which absolute paths are shortened to their last part: where they lay is nobody's business."""
    if isinstance(node, Mapping):
        return {key: _without_places(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_places(item) for item in node]
    return _short(node) if isinstance(node, str) else node


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
