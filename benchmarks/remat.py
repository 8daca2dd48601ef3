"""What each rematerialisation policy keeps: `python benchmarks/remat.py [--topology v5e:2x2 --tokens 4096 ...]`.

Compiles the gradient of one row a device, for a TPU slice that this machine doesn't have (needs libtpu), and prints a
table: temporary memory a chip, and what waits on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pkv.config import MeshConfig
from pkv.grpo.logprobs import token_logprobs
from pkv.mesh import TRAINING_RULES, batch_sharding, make_mesh, shardings
from pkv.model import Arch, choose_kernel, forward, param_axes, param_shapes
from pkv.model.decoder import Remat
from pkv.plan.compiled import temporary_bytes

# Qwen2.5-1.5B's shape.
SHAPE = Arch(
    vocab_size=151_936, hidden=1536, layers=28, heads=12, kv_heads=2, head_size=128, ffn=8960, qkv_bias=True,
    tied_embeddings=True, rope_theta=1e6,
)  # fmt: skip


def compile_gradient(arch: Arch, topology: str, sizes: MeshConfig, tokens: int, remat: Remat) -> Any:
    """The compiled gradient, in bfloat16, of the mean log-probability of one row of `tokens` a device."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU here that two processes could fight for
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, dtype = make_mesh(sizes, devices), jnp.bfloat16
    kernel = choose_kernel("auto", mesh, arch, dtype)

    def place(shape: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    params = jax.tree.map(
        place, param_shapes(arch), shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)
    )
    row = jax.ShapeDtypeStruct((len(devices), tokens), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        hidden_BTD, _ = forward(
            params, arch, tokens_BT, positions_BT, segments_BT=segments_BT, dtype=dtype, remat=remat, kernel=kernel,
        )  # fmt: skip
        return token_logprobs(params, arch, hidden_BTD, tokens_BT)[0].mean()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(params, row, row, row).compile()


def main() -> None:
    arguments = argparse.ArgumentParser(description="Memory by rematerialisation policy, compiled for a TPU slice.")
    arguments.add_argument("--topology", default="v5e:2x2")
    arguments.add_argument("--tokens", type=int, default=4096)
    arguments.add_argument("--layers", type=int, default=SHAPE.layers)
    arguments.add_argument("--remat", nargs="*", choices=get_args(Remat), default=get_args(Remat))
    chosen = arguments.parse_args()
    arch = dataclasses.replace(SHAPE, layers=chosen.layers)
    print("| remat | temporary memory, GiB a chip | on the host, GiB | compiled in, s |\n|---|---|---|---|")
    for remat in chosen.remat:
        began = time.perf_counter()
        try:
            compiled = compile_gradient(arch, chosen.topology, MeshConfig(data=1, fsdp=-1), chosen.tokens, remat)
            memory = compiled.memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            print(f"| {remat} | does not fit: {' '.join(str(error).split())[:240]} | | |")
            continue
        device, host = temporary_bytes(memory) / 2**30, memory.host_temp_size_in_bytes / 2**30
        print(f"| {remat} | {device:.2f} | {host:.2f} | {time.perf_counter() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
