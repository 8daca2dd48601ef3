"""What the sampler's programs take of a TPU: `python benchmarks/sampler.py [--topology v5e:2x2 --model 1.5b ...]`.

Goes through a rollout without devices (`pkv.sampling.rehearse`), and compiles the largest call of each program for a
TPU slice that this machine doesn't have (needs libtpu). Prints a table: bytes a chip by kind.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pkv.config import MeshConfig, SamplingConfig
from pkv.mesh import SAMPLING_RULES, make_mesh, shardings
from pkv.model import Arch, param_axes, param_shapes
from pkv.sampling import Engine, Request, rehearse, row_keys

QWEN = {"vocab_size": 151_936, "head_size": 128, "qkv_bias": True, "rope_theta": 1e6}
TIED = {"tied_embeddings": True}
SHAPES = {  # Qwen2.5's
    "0.5b": Arch(**QWEN | TIED | {"head_size": 64}, hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864),
    "1.5b": Arch(**QWEN | TIED, hidden=1536, layers=28, heads=12, kv_heads=2, ffn=8960),
    "7b": Arch(**QWEN | {"vocab_size": 152_064}, hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18_944),
    "14b": Arch(**QWEN | {"vocab_size": 152_064}, hidden=5120, layers=48, heads=40, kv_heads=8, ffn=13_824),
}


def compile_rollout(
    arch: Arch, topology: str, sizes: MeshConfig, sampling: SamplingConfig, asked: list[Request]
) -> Iterator[tuple[str, Any]]:
    """The largest call of each program of a rollout in bfloat16: its name, and what was compiled."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU here that two processes could fight for
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(sizes, devices)
    engine = Engine(arch, sampling, (0,), mesh, "bfloat16")
    shapes = param_shapes(engine.programs.arch, jax.numpy.bfloat16)
    places = shardings(param_axes(engine.programs.arch), shapes, mesh, SAMPLING_RULES)
    weights = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places)
    seen = set()
    for call in rehearse(engine, asked):
        if call.name in seen:
            continue
        seen.add(call.name)
        yield call.name, call.lower(engine.programs, weights).compile()


def requests(prompts: int, samples: int, prompt_tokens: int, max_new_tokens: int) -> list[Request]:
    """Prompts that begin alike for half of their length."""
    draw = np.random.default_rng(0)
    drawn = draw.integers(1, 1000, (prompts, prompt_tokens)).astype(np.int32)
    drawn[:, : prompt_tokens // 2] = drawn[0, : prompt_tokens // 2]
    keys = row_keys(0, "rehearsal", 0, [str(number) for number in range(prompts)], samples)
    return [Request(prompt, key, max_new_tokens) for prompt, key in zip(drawn, keys, strict=True)]


def main() -> None:
    arguments = argparse.ArgumentParser(description="The sampler's memory by program, compiled for a TPU slice.")
    arguments.add_argument("--topology", default="v5e:2x2")
    arguments.add_argument("--model", choices=SHAPES, default="1.5b")
    arguments.add_argument("--tensor", type=int, default=2)
    arguments.add_argument("--sequence", type=int, default=1)
    arguments.add_argument("--prompts", type=int, default=8)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--prompt-tokens", type=int, default=1024)
    arguments.add_argument("--max-new-tokens", type=int, default=11_264)
    arguments.add_argument("--kv-memory-gb", type=float, default=8.0)
    chosen = arguments.parse_args()
    sizes = MeshConfig(data=-1, fsdp=1, sequence=chosen.sequence, tensor=chosen.tensor)
    sampling = SamplingConfig(slots=chosen.slots, kv_memory_gb=chosen.kv_memory_gb)
    asked = requests(chosen.prompts, chosen.samples, chosen.prompt_tokens, chosen.max_new_tokens)
    print("| program | arguments, GiB a chip | temporary, GiB | result not in place, GiB |\n|---|---|---|---|")
    began = time.perf_counter()
    for name, compiled in compile_rollout(SHAPES[chosen.model], chosen.topology, sizes, sampling, asked):
        memory = compiled.memory_analysis()
        given, some = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        fresh = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30
        print(f"| {name} | {given:.2f} | {some:.2f} | {fresh:.2f} |", flush=True)
    print(f"Compiled in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
