"""What TRL's own loss gives on made-up tensors: `python benchmarks/trl_losses.py` in an environment with trl and torch.

Rewrites tests/golden/trl_losses.json, which the tests hold pkv's losses against: loss and gradient by log-probability.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "trl_losses.json"
LENGTHS, MOST = (5, 3, 1, 4), 6  # tokens of each response, and max_completion_length
LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "dual clip": {"loss_type": "dapo", "delta": 1.4},
    "k3": {"loss_type": "dapo", "beta": 0.1},
    "entropy": {"loss_type": "dapo", "entropy": 0.05},
    "importance": {"loss_type": "dapo", "beta": 0.1, "cap": 1.2},  # vLLM's weights, "token_truncate" in TRL's words
}


def trl_loss(
    inputs: dict[str, torch.Tensor], logprobs: torch.Tensor, entropies: torch.Tensor, chosen: dict
) -> torch.Tensor:
    """`GRPOTrainer._compute_loss` on given log-probabilities: a stand-in has what it reads of a trainer."""
    kind = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None} | chosen
    one = SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x.reshape(-1), reduce=lambda x, **_: x)
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm="cap" in kind,
        vllm_importance_sampling_correction=True,
        use_adaptive_entropy=False,
        beta=kind.get("beta", 0.0),
        entropy_coef=kind.get("entropy", 0.0),
        _entropy_bonus_enabled="entropy" in kind,
        max_completion_length=MOST,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=one,
        args=SimpleNamespace(delta=kind["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        **{name: kind[name] for name in ("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high")},
    )
    weights = torch.exp(inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"])
    inputs = inputs | {"importance_sampling_ratio": weights.clamp(max=kind.get("cap", 1.0))}
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    mask = torch.tensor([[float(t < length) for t in range(shape[1])] for length in LENGTHS])
    old = -torch.rand(shape, generator=draw) - 0.5
    now = old + 0.4 * torch.randn(shape, generator=draw)
    reference = old + 0.3 * torch.randn(shape, generator=draw)
    entropies, advantages = torch.rand(shape, generator=draw), torch.randn(len(LENGTHS), generator=draw)
    sampler = old + 0.3 * torch.randn(shape, generator=draw)
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "sampling_per_token_logps": sampler,
        "num_items_in_batch": mask.sum(),
    }
    losses = {}
    for name, chosen in LOSSES.items():
        varied = now.clone().requires_grad_()
        loss = trl_loss(inputs, varied, entropies, chosen)
        loss.backward()
        losses[name] = {"loss": loss.item(), "gradient": varied.grad.tolist()}
    given = {
        "mask": mask,
        "now": now,
        "old": old,
        "reference": reference,
        "sampler": sampler,
        "entropies": entropies,
        "advantages": advantages,
    }
    found = {"made_with": {"trl": version("trl"), "torch": torch.__version__}, "budget": MOST, "losses": losses}
    found["given"] = {name: tensor.tolist() for name, tensor in given.items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
