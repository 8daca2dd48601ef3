"""pkv's losses against TRL's own code, on the same tensors: golden numbers of benchmarks/trl_losses.py."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import PolicyLoss
from pkv.grpo import Layout, Sequence, pack
from pkv.grpo.losses import Logprobs, token_losses
from pkv.grpo.update import sequence_means

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_losses.json").read_text())
OURS = {
    "grpo": PolicyLoss(clip_high=0.2, normalise="sequences"),
    "dapo": PolicyLoss(),
    "dr_grpo": PolicyLoss(clip_high=0.2, normalise="constant"),
    "gspo": PolicyLoss("gspo", clip_low=0.05, clip_high=0.08, normalise="sequences"),
    "cispo": PolicyLoss("cispo", cap=1.3),
    "dual clip": PolicyLoss(clip_high=0.2, dual_clip=1.4),
    "k3": PolicyLoss(clip_high=0.2, kl="k3", kl_weight=0.1),
    "entropy": PolicyLoss(clip_high=0.2, entropy=0.05),
    "importance": PolicyLoss(clip_high=0.2, kl="k3", kl_weight=0.1, importance_cap=1.2),
}


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_losses_and_gradients_are_trls(name):
    loss, given = OURS[name], {key: np.array(value, np.float32) for key, value in GOLDEN["given"].items()}
    lengths = given["mask"].sum(axis=1).astype(int)
    sequences = [
        Sequence(np.zeros(1, np.int32), np.zeros(n, np.int32), np.full(n, advantage, np.float32), old[:n])
        for n, advantage, old in zip(lengths, given["advantages"], given["old"], strict=True)
    ]
    batches = pack(sequences, Layout(16, 4, normalise=loss.normalise, budget=GOLDEN["budget"]))
    # Where each of TRL's tokens went, by its old log-probability; all are different.
    assert len(np.unique(given["old"])) == given["old"].size
    total, gradient = 0.0, np.zeros_like(given["now"])
    for batch in batches:
        at = [np.argwhere(given["old"] == value)[0] for value in batch.sampler_logprobs[batch.mask > 0]]
        rows, columns = np.array(at).T

        def placed(values, batch=batch, rows=rows, columns=columns):
            array = np.zeros(batch.mask.shape, np.float32)
            array[batch.mask > 0] = values[rows, columns]
            return jnp.asarray(array)

        def summed(now, batch=batch, placed=placed):
            reference = placed(given["reference"]) if loss.kl_weight else None
            sampler = placed(given["sampler" if name == "importance" else "old"])
            logprobs = Logprobs(now, placed(given["old"]), sampler, reference)
            average = lambda x: sequence_means(x, mask_BT=batch.mask, branches_BT=batch.branches)  # noqa: E731
            found = token_losses(loss, logprobs, placed(given["entropies"]), jnp.asarray(batch.advantages), average)
            return (found.loss * batch.weights).sum()

        part, by_token = jax.value_and_grad(summed)(placed(given["now"]))
        total += float(part)
        gradient[rows, columns] = np.asarray(by_token)[batch.mask > 0]
    wanted = GOLDEN["losses"][name]
    assert total == pytest.approx(wanted["loss"], rel=1e-5)
    np.testing.assert_allclose(gradient, np.array(wanted["gradient"]) * given["mask"], rtol=1e-4, atol=1e-7)
