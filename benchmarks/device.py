"""A decode step and a gradient of a released model's shape on this device, with random weights and full rows.

    python benchmarks/device.py decode Qwen/Qwen2.5-7B --rows 64 --tokens 1024 --prompt 256
    python benchmarks/device.py gradient Qwen/Qwen2.5-7B --rows 1 --length 4096 --remat none
    python benchmarks/device.py decode ./m25 --rows 64 --tokens 320 --prompt 128 --dtype float32

Whole runs are `pkv bench`; these say what the largest program of each takes by itself, in a tenth of the time. A decode
step is held against reading all weights, keys and values once at the rate of bare reading, a gradient against bare
matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pkv.config import MeshConfig, ModelConfig, OptimizerConfig, PolicyLoss, SamplingConfig
from pkv.grpo import Learner
from pkv.grpo.packing import empty
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import Arch, Level, Params, param_shapes, weight_axes
from pkv.model.arithmetic import update_flops
from pkv.plan import model_shape
from pkv.rates import matrix_tflops, read_gbs
from pkv.sampling import Engine, device_bytes
from pkv.sampling.pool import NOWHERE
from pkv.sampling.programs import Rows, Table

SAMPLES = 8  # of a prompt


def drawn(shapes: Any) -> Any:
    """Small random numbers in these shapes, dtypes and places: zeros can be faster than what a model is made of."""
    programs: dict[Any, Any] = {}
    leaves, structure = jax.tree.flatten(shapes)
    found = []
    for number, shape in enumerate(leaves):
        kind = shape.shape, shape.dtype, shape.sharding
        if kind not in programs:
            draw = lambda key, s=shape: (0.02 * jax.random.normal(key, s.shape)).astype(s.dtype)  # noqa: E731
            programs[kind] = jax.jit(draw, out_shardings=shape.sharding)
        found.append(programs[kind](jax.random.key(number)))
    return jax.tree.unflatten(structure, found)


def weights_of(arch: Arch, mesh: Any, dtype: Any = jnp.float32) -> Params:
    """Random weights where training has them."""
    shapes = param_shapes(arch, dtype)
    places = shardings(weight_axes(shapes, arch), shapes, mesh, TRAINING_RULES)
    return drawn(jax.tree.map(lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=p), shapes, places))


def best(work: Callable[[], Any], times: int = 4) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the fastest one after it."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def decode(asked: argparse.Namespace) -> None:
    """A segment of a batch whose rows have said all but the segment's tokens of `asked.tokens`."""
    mesh, arch = make_mesh(MeshConfig()), model_shape(asked.model)
    config = SamplingConfig(slots=asked.rows, attention=asked.attention)
    engine = Engine(arch, config, (NOWHERE,), mesh, asked.dtype)
    programs, B, steps = engine.programs, asked.rows, config.segment
    own, shared = asked.tokens // programs.page, asked.prompt // programs.page  # pages of a row, and of a prompt
    weights = engine.load(weights_of(arch, mesh, jnp.dtype(asked.dtype)))
    stock, prompts = (drawn(programs.stock_shapes(pages)) for pages in (B * own, B // SAMPLES * shared))
    readers = np.repeat(np.arange(B).reshape(-1, SAMPLES), shared, axis=0)
    first = np.tile(np.arange(shared) * programs.page, B // SAMPLES)
    numbers = lambda array: jnp.asarray(array, jnp.int32)  # noqa: E731
    level = Level(prompts, *map(numbers, (readers, first, np.full(len(first), asked.prompt))))
    at = asked.prompt + np.arange(own) * programs.page
    table = Table(
        numbers(np.arange(B).repeat(own)[:, None]), numbers(np.tile(at, B)), numbers(np.full(B * own, NOWHERE))
    )
    position = asked.prompt + asked.tokens - steps - 1
    ahead = np.full((B, 1, 2), NOWHERE)
    ahead[:, 0, 0] = np.arange(B) * own + own - 1  # the segment goes into each row's last page
    full = lambda number: numbers(np.full(B, number))  # noqa: E731
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (B, 2), dtype=np.uint32))
    origin = full(asked.prompt + (own - 1) * programs.page)
    active, forced = jnp.ones(B, bool), numbers(np.full((B, steps), -1))
    rows = Rows(full(5), full(position), full(NOWHERE - 1), origin, active, keys, forced, numbers(ahead))

    def segment() -> Any:
        nonlocal stock
        stock, said = programs.decode(weights, (level,), stock, table, rows)
        return said

    compiled, taken = best(segment)
    looked_up = 0 if arch.tied_embeddings else sum(device_bytes(weights["embedding"]))
    read = sum(device_bytes(weights)) - looked_up + sum(device_bytes((stock, prompts)))
    rate, step = read_gbs(), taken / steps
    floor = read / 1e9 / rate
    print(f"{asked.model}, {B} rows at {asked.prompt} + {asked.tokens} tokens: {step * 1e3:.2f} ms a step,", end=" ")
    print(f"{B / step:,.0f} tokens/s; {read / 1e9:.1f} GB to read at {rate:,.0f} GB/s: {floor / step:.0%};", end=" ")
    print(f"compiled in {compiled:.0f} s")


def gradient(asked: argparse.Namespace) -> None:
    """Of a micro-batch of whole rows, each of so many segments."""
    mesh, arch, (B, T) = make_mesh(MeshConfig()), model_shape(asked.model), (asked.rows, asked.length)
    model = ModelConfig(dtype="bfloat16", remat=asked.remat, attention=asked.attention)
    learner = Learner(arch, model, OptimizerConfig(), mesh)
    params, draw = weights_of(arch, mesh), np.random.default_rng(0)
    size = T // asked.segments
    ids = lambda: draw.integers(0, 1000, (B, T)).astype(np.int32)  # noqa: E731
    batch = dataclasses.replace(
        empty(B, T),
        tokens=ids(),
        targets=ids(),
        positions=np.tile(np.arange(T) % size, (B, 1)).astype(np.int32),
        segments=np.tile(1 + np.arange(T) // size, (B, 1)).astype(np.int32),
        mask=np.ones((B, T), np.float32),
        weights=np.full((B, T), 1 / (B * T), np.float32),
        advantages=draw.normal(size=(B, T)).astype(np.float32),
        sampler_logprobs=np.full((B, T), -np.log(arch.vocab_size), np.float32),
    )
    compiled, taken = best(lambda: learner.gradient(params, [batch], PolicyLoss()))
    done = update_flops(arch, [(size, size)] * (B * asked.segments), False) / taken / 1e12
    rate = matrix_tflops("bfloat16")
    peak = max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())
    print(f"{asked.model}, {B} rows of {T} in {asked.segments}, remat {asked.remat}: {taken * 1e3:.0f} ms,", end=" ")
    print(f"{done:.0f} TFLOP/s, {done / rate:.0%} of bare products' {rate:.0f}; {peak / 2**30:.0f} GiB", end=" ")
    print(f"at most; compiled in {compiled:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for name, run in (("decode", decode), ("gradient", gradient)):
        kind = kinds.add_parser(name)
        kind.set_defaults(run=run)
        kind.add_argument("model")
        kind.add_argument("--rows", type=int, required=True)
        kind.add_argument("--attention", default="auto")
        if name == "decode":
            kind.add_argument("--tokens", type=int, default=1024)
            kind.add_argument("--prompt", type=int, default=256)
            kind.add_argument("--dtype", default="bfloat16")
        else:
            kind.add_argument("--length", type=int, required=True)
            kind.add_argument("--segments", type=int, default=1)
            kind.add_argument("--remat", default="none")
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
