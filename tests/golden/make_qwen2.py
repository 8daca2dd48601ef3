"""Makes the golden files of Qwen2 with transformers' torch model: `python make_qwen2.py` writes ./qwen2 anew.

Needs torch and transformers. The test of parity calls the same functions live where torch is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 64


def make_model(seed: int, **changes: Any) -> Any:
    """A tiny random Qwen2 in 32 bits whose every weight matters: biases and norms are random too."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes})).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.copy_(0.5 * torch.randn_like(weight))
    return model


def answers(model: Any, seed: int) -> dict[str, np.ndarray]:
    """What the model says: logits of random rows [2, 40, V], and greedy continuations of prompts of unequal length."""
    import torch

    vocabulary = model.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (2, 40))
    continued = []
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits
        for row, length in zip(tokens, (5, 17), strict=True):
            ids = torch.tensor(row[None, :length])
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            continued.append(ids[0, length:].numpy())
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": np.array([5, 17], np.int32),
        "logits": logits.numpy(),
        "greedy": np.stack(continued).astype(np.int32),
    }


def main() -> None:
    directory = Path(__file__).parent / "qwen2"
    model = make_model(seed=0)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "answers.npz", **answers(model, seed=1))


if __name__ == "__main__":
    main()
