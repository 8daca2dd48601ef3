"""How weights lie for a decode step, compiled: `python benchmarks/flat.py [--topology v5e:2x2 ...]`.

A layer of Qwen2.5-14B as each of four chips has it, for chips that this machine doesn't have (needs libtpu), one token
of each of 64 rows: with heads and their sizes as two axes of the weights, with one, and so in 8 bits. Prints what the
compiler says: bytes of weights, bytes beside them, and the cycles that it estimates for a layer. Nothing runs.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkv.config import MeshConfig
from pkv.mesh import make_mesh
from pkv.model import Arch, forward, param_shapes
from pkv.plan.compiled import temporary_bytes
from pkv.sampling.laying import Lay

SHAPE = Arch(vocab_size=1024, hidden=5120, layers=8, heads=10, kv_heads=2, head_size=128, ffn=3456, qkv_bias=True)
ROWS = 64
WAYS = {"as they are": (False, False), "flat": (True, False), "flat, 8 bits": (True, True)}
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def compile_layers(mesh: Mesh, **how: bool) -> Any:
    """A scan over the layers, each of which reads its weights once. how: flat, eight_bit."""
    weights = Lay(SHAPE, 1, jnp.dtype(jnp.bfloat16), mesh, "stacked", 1, **how).described(param_shapes(SHAPE))
    tokens = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(lambda weights, tokens_B1, at_B1: forward(weights, SHAPE, tokens_B1, at_B1, dtype=jnp.bfloat16)[0])
    return step.lower(weights, tokens, tokens).compile()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--topology", nargs="*", default=["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
    chosen = arguments.parse_args()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU here that two processes could fight for
    print("| chip | weights | MB of arguments | MB beside them | cycles a layer | of flat ones in 16 bits |")
    print("|---|---|---|---|---|---|")
    for topology in chosen.topology:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh, rows = make_mesh(MeshConfig(), devices[:1]), {}
        for name, (flat, eight_bit) in WAYS.items():
            compiled = compile_layers(mesh, flat=flat, eight_bit=eight_bit)
            memory, cycles = compiled.memory_analysis(), sum(map(int, CYCLES.findall(compiled.as_text())))
            rows[name] = memory.argument_size_in_bytes / 1e6, temporary_bytes(memory) / 1e6, cycles
        for name, (given, beside, cycles) in rows.items():
            share = cycles / rows["flat"][2]
            print(f"| {topology} | {name} | {given:.0f} | {beside:.1f} | {cycles:,} | {share:.2f} |")


if __name__ == "__main__":
    main()
