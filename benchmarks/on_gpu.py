"""Does a GPU say what a CPU says: sampling, attention by its kernels, and the gradient, on a small random model.

    JAX_PLATFORMS=cuda,cpu python benchmarks/on_gpu.py

Prints a line for each check; the exit status is 1 if one is beyond its bound.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from pkv.config import GrpoConfig, MeshConfig, ModelConfig, OptimizerConfig, PolicyLoss, SamplingConfig
from pkv.grpo import Learner, Sequence, pack
from pkv.grpo.logprobs import token_logprobs
from pkv.mesh import make_mesh
from pkv.model import Arch, forward, init_params
from pkv.sampling import Engine, Request, row_keys

ARCH = Arch(
    vocab_size=1024,
    hidden=256,
    layers=12,
    heads=8,
    kv_heads=2,
    head_size=64,
    ffn=512,
    qkv_bias=True,
    max_positions=2048,
)
PROMPTS, SAMPLES, PROMPT, NEW = 3, 4, 300, 100
failed = []


def check(what: str, found: float, bound: float) -> None:
    """One line; beyond its bound it counts as failed."""
    print(f"{'ok  ' if found <= bound else 'FAIL'} {what}: {found:.3g}, at most {bound:g}", flush=True)
    failed.extend([] if found <= bound else [what])


def sharper(path, weight):
    """A random model knows nothing; with larger weights it is sure of it, and an error shows."""
    return weight * 3 if not path[-1].key.endswith("norm") else weight


def requests() -> list[Request]:
    """Prompts that begin alike, with some samples each."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, ARCH.vocab_size, (PROMPTS, PROMPT)).astype(np.int32)
    prompts[:, :140] = prompts[0, :140]
    keys = row_keys(0, "gpu", 0, [str(n) for n in range(PROMPTS)], SAMPLES)
    return [Request(prompt, key, NEW) for prompt, key in zip(prompts, keys, strict=True)]


def sampled(params, devices, dtype: str, attention: str) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Tokens and log-probabilities under the policy, by request and sample."""
    mesh = make_mesh(MeshConfig(), devices)
    config = SamplingConfig(slots=8, attention=attention, kv_memory_gb=1.0, temperature=1.0)
    engine = Engine(ARCH, config, (0,), mesh, dtype)
    done = engine.sample(engine.load(jax.device_put(params, devices[0])), requests())
    return {(one.request, one.sample): (one.tokens, one.policy_logprobs) for one in done}


def agreement(ours, theirs) -> tuple[float, float]:
    """Share of responses that differ at all; the largest difference of log-probabilities where they don't."""
    same = [key for key in ours if np.array_equal(ours[key][0], theirs[key][0])]
    gaps = [np.abs(ours[key][1] - theirs[key][1]).max() for key in same]
    return 1 - len(same) / len(ours), float(max(gaps, default=np.inf))


def trained(params, done, kernel: str, dtype: str) -> float:
    """The mean difference of the sampler's log-probabilities from those of whole rows."""

    @jax.jit
    def whole_row(params, row):
        at = {"segments_BT": jnp.ones_like(row), "dtype": dtype, "kernel": kernel}
        hidden, _ = forward(params, ARCH, row, jnp.arange(row.shape[1])[None], **at)
        return token_logprobs(params, ARCH, hidden[:, :-1], row[:, 1:])[0][0]

    gaps = []
    for (request, _), (tokens, said) in done.items():
        whole = np.concatenate([requests()[request].prompt, tokens])
        logprobs = whole_row(params, np.pad(whole, (0, PROMPT + NEW - len(whole)))[None])
        gaps.append(np.abs(np.asarray(logprobs)[PROMPT - 1 : len(whole) - 1] - said))
    return float(np.concatenate(gaps).mean())


def gradient(params, devices, attention: str, dtype: str):
    """Of one packed micro-batch, as one vector on the host."""
    mesh = make_mesh(MeshConfig(), devices)
    params = jax.device_put(params, devices[0])
    learner = Learner(ARCH, ModelConfig(dtype=dtype, attention=attention), OptimizerConfig(), mesh)
    draw, sequences = np.random.default_rng(1), []
    for length in (40, 90, 200, 333, 500, 77):
        response = draw.integers(1, ARCH.vocab_size, length).astype(np.int32)
        prompt = draw.integers(1, ARCH.vocab_size, 30).astype(np.int32)
        logprobs, advantages = (draw.normal(mean, 0.5, length).astype(np.float32) for mean in (-7, 0))
        sequences.append(Sequence(prompt, response, advantages, logprobs))
    micros = pack(sequences, learner.layout(GrpoConfig(row_tokens=1024, micro_rows=2, share_prompts=False)))
    found, _ = learner.gradient(params, micros, PolicyLoss())
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(found)])


def main() -> int:
    gpu, cpu = jax.devices("gpu")[:1], jax.devices("cpu")[:1]
    print(gpu[0].device_kind, jax.__version__)
    with jax.default_device(cpu[0]):
        params = jax.device_get(jax.tree_util.tree_map_with_path(sharper, init_params(ARCH, jax.random.key(0))))
    with jax.default_matmul_precision("highest"):
        expected = sampled(params, cpu, "float32", "xla")
        for attention in ("xla", "triton"):
            differ, gap = agreement(sampled(params, gpu, "float32", attention), expected)
            check(f"32 bits, pages by {attention}: responses that differ from the CPU's", differ, 0.1)
            check(f"32 bits, pages by {attention}: log-probabilities", gap, 2e-3)
    with jax.default_device(gpu[0]):
        there = jax.device_put(params, gpu[0])
        for attention in ("xla", "triton"):
            done = sampled(params, gpu, "bfloat16", attention)
            for kernel in ("xla", "cudnn"):
                check(
                    f"bfloat16, pages by {attention}, rows by {kernel}: log-probabilities of sampler and trainer, mean",
                    trained(there, done, kernel, "bfloat16"),
                    0.02,
                )
    with jax.default_matmul_precision("highest"), jax.default_device(cpu[0]):
        expected = gradient(params, cpu, "xla", "float32")
    for attention in ("xla", "cudnn"):
        off = np.linalg.norm(gradient(params, gpu, attention, "bfloat16") - expected) / np.linalg.norm(expected)
        check(f"gradient in bfloat16, rows by {attention}: off by", float(off), 0.03)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
