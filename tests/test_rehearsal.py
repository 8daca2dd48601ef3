"""A rollout gone through without devices: the sampler's programs compile for TPU, and keep their pages in place."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from jax.sharding import Mesh

from pkv.config import parse_config
from pkv.model import Arch
from pkv.plan import Work, read_slice
from pkv.plan.planning import described_mesh
from pkv.plan.programs import Programs

ARCH = Arch(
    vocab_size=1024, hidden=512, layers=12, heads=4, kv_heads=2, head_size=128, ffn=864, qkv_bias=True,
    tied_embeddings=True, rope_theta=1e6,
)  # fmt: skip


def programs_of(arch: Arch, topology: str, sizes: Mapping[str, int]) -> tuple[dict[str, Any], Mesh]:
    """The sampler's programs, compiled, and their mesh."""
    config = parse_config(
        {
            "model": {"path": "nowhere", "dtype": "bfloat16"},
            "mesh": sizes,
            "sampling": {"slots": 16},
            "grpo": {"prompts": 2, "samples": 8, "row_tokens": 2304},
            "rounds": [{"name": "only", "steps": 1, "max_new_tokens": 2000}],
        }
    )
    mesh = described_mesh(config, read_slice(topology))
    tasks = Programs(Work(config, arch, 300), mesh).rollout(1e9)
    return {task.name: task.lowered.compile() for task in tasks if task.name != "reshard"}, mesh


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_layers_weights_are_read_where_they_lie():
    """With ten heads and their sizes as two axes, as the trainer has them, XLA took each layer of the queries' and the
    outputs' weights, of keys' and of values', out of its stack first, and turned the whole stack of queries' round."""
    arch = dataclasses.replace(ARCH, heads=10)
    programs, _ = programs_of(arch, "v5e:2x2", {"data": 2, "sequence": 2})
    made = list(_made(programs["decode"].as_text()))
    assert made.count(programs["decode"].memory_analysis().alias_size_in_bytes // 2) == 2, "keys and values are seen"
    layer = 2 * arch.hidden * arch.heads * arch.head_size
    assert not {layer, layer * arch.layers, layer * arch.kv_heads // arch.heads} & set(made)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("sizes", [{"data": 1, "tensor": 4}, {"data": 2, "sequence": 2}], ids=["tensor", "sequence"])
def test_the_sampler_compiles_for_tpu_and_keeps_its_pages_in_place(topology, sizes):
    """tensor=4 repeats the two key-value heads; with sequence=2 the devices merge their parts of a row."""
    programs, mesh = programs_of(ARCH, topology, sizes)
    assert {"decode", "empty", "prefill", "prefix"} <= set(programs)
    assert "resize" not in programs, "a stock has its size from the beginning"
    decode = programs["decode"]
    memory = decode.memory_analysis()
    keys = memory.alias_size_in_bytes // 2  # of all rows and layers, given and returned in place
    of_rows = 16 * 2000 // math.prod((mesh.shape["data"], mesh.shape["sequence"]))  # positions, of a device
    read = 2 * of_rows * max(1, ARCH.kv_heads // mesh.shape["tensor"]) * ARCH.head_size  # bytes of a layer's keys
    assert keys > 2 * ARCH.layers * read, "the case must show that what is read is a part"
    assert memory.temp_size_in_bytes < read
    made = list(_made(decode.as_text()))
    assert made.count(keys) == 2  # keys and values are written in place
    assert not [size for size in made if 0.9 * read < size < keys]  # no layer's slice, nor a copy of it
    # Nor a copy of the weights whose rows, 864 or 216 numbers, are no multiple of a register's 128.
    assert 2 * ARCH.layers * ARCH.hidden * ARCH.ffn // mesh.shape["tensor"] not in made


def _made(program: str) -> Iterator[int]:
    """Bytes of the 16-bit arrays that a compiled program makes, but for those within fusions: never whole."""
    for computation in program.split("\n\n"):
        if computation.lstrip().startswith("%fused"):
            continue
        for shape in re.findall(r"= bf16\[([\d,]+)\]\S* (?:fusion|copy|dynamic-slice|slice|transpose)\(", computation):
            yield 2 * math.prod(map(int, shape.split(",")))
