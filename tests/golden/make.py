"""Makes the golden files with transformers' torch models: `python make.py` writes a directory for each family anew.

Needs torch and transformers. The tests of parity call the same functions live where torch is installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 64
ROW = 40  # tokens of a row; windows and original contexts below are shorter, prompts with what follows longer
FAR = 100_000  # where a row begins whose positions are far beyond any tiny context

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,  # large enough to be seen
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,  # so that fast, slow and middle pairs are all there
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [1.5, 2.5, 4.0],
}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 13, "sliding_window": 6, "tie_word_embeddings": True}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

# family: case: what its config says differently. "golden" is the case that lies on disk.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": {
        "golden": {"rope_parameters": {**YARN, "beta_fast": 4.0}},
        "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
        "tied": {"tie_word_embeddings": True},
        "no grouping": {"num_key_value_heads": 4},
        "window above": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        "linear": {"rope_parameters": LINEAR},
    },
    "qwen3": {
        "golden": {"head_dim": 12, "tie_word_embeddings": True},
        "yarn, mscale": {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}},
        "yarn, attention factor": {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    },
    "llama": {
        "golden": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        "plain": {"num_key_value_heads": 4},
        "linear": {"rope_parameters": LINEAR},
    },
    "mistral": {"golden": {"sliding_window": 7}, "no window": {"sliding_window": None, "head_dim": 12}},
    "gemma2": {
        "golden": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "no caps": {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {
        "golden": {**GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPES},
        "plain": {**GEMMA, "num_key_value_heads": 1, "final_logit_softcapping": 3.0},
    },
    "phi3": {
        "golden": {"rope_parameters": LONG, "original_max_position_embeddings": 4},
        "plain": {},
        "window": {"sliding_window": 5},
        "longrope, short": {"rope_parameters": LONG, "original_max_position_embeddings": 110},
    },
}


def make_model(family: str, changes: dict[str, Any], seed: int) -> Any:
    """A tiny random model in 32 bits whose every weight matters, norms and biases too; all are whole in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**TINY, **changes})
    # The other kinds of attention leave out the caps of scores.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if name.endswith("norm.weight"):
                weight.copy_((0 if family.startswith("gemma") else 1) + 0.3 * noise)
            else:
                weight.copy_((0.5 if name.endswith("bias") else 0.3) * noise)
            weight.copy_(weight.bfloat16())
    return model


def answers(model: Any, seed: int) -> dict[str, Any]:
    """What the model says.

    tokens: random rows [2, ROW]. logits, far_logits: of these rows at positions 0.., and of their beginnings at FAR...
    lengths, greedy: prompts of unequal length, and what follows them. loss: mean cross-entropy of the rows.
    gradients: its gradient for every tensor, by name.
    """
    import torch

    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, ROW))
    rows = torch.tensor(tokens)
    lengths, continued = (5, 17), []
    with torch.no_grad():
        for row, length in zip(rows, lengths, strict=True):
            ids = row[None, :length]
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            continued.append(ids[0, length:].numpy())
        far = model(rows[:, :12], position_ids=torch.arange(FAR, FAR + 12)[None].expand(2, -1)).logits
    logits = model(rows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "logits": logits.detach().numpy(),
        "far_logits": far.numpy(),
        "greedy": np.stack(continued).astype(np.int32),
        "loss": loss.detach().numpy(),
        "gradients": {name: weight.grad.numpy() for name, weight in model.named_parameters()},
    }


def save(model: Any, directory: Path) -> None:
    """The checkpoint in bfloat16, which loses nothing of these weights."""
    model.bfloat16().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    """Gradients are kept by their lengths only: they would be as large as the weights."""
    for family, cases in CASES.items():
        directory = Path(__file__).parent / family
        shutil.rmtree(directory, ignore_errors=True)
        model = make_model(family, cases["golden"], seed=0)
        said = answers(model, seed=1)
        gradients = said.pop("gradients")
        names = sorted(gradients)
        lengths = np.array([np.linalg.norm(gradients[name]) for name in names], np.float32)
        save(model, directory)
        np.savez_compressed(directory / "answers.npz", **said, gradient_names=names, gradient_lengths=lengths)


if __name__ == "__main__":
    main()
