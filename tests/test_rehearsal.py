"""A rollout gone through without devices: the sampler's programs compile for TPU, and keep their pages in place."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re

import pytest
from sampler import SHAPES, compile_rollout, requests

from pkv.config import MeshConfig, SamplingConfig


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_the_sampler_compiles_for_tpu_and_keeps_its_pages_in_place(topology):
    """tensor=4 repeats the two key-value heads; with sequence=2 the devices merge their parts of a row."""
    arch = dataclasses.replace(SHAPES["1.5b"], vocab_size=1024, hidden=512, ffn=1024, heads=4, layers=12)
    for sizes in (MeshConfig(tensor=4), MeshConfig(data=2, sequence=2)):
        sampling = SamplingConfig(slots=16, kv_memory_gb=1.0)
        programs = dict(compile_rollout(arch, topology, sizes, sampling, requests(2, 8, 300, 2000)))
        assert {"decode", "empty", "grow", "prefill", "prefix"} <= set(programs)
        decode = programs["decode"]
        memory = decode.memory_analysis()
        keys = memory.alias_size_in_bytes // 2  # of all rows, given and returned in place
        assert memory.temp_size_in_bytes < 1.3 * keys  # v5p copies the prompts' pages, a quarter of these
        assert all(_copied(line) < 0.9 * keys for line in decode.as_text().splitlines())


def _copied(line: str) -> int:
    """Bytes that a line of a compiled program copies in 16 bits; 0 for other lines."""
    found = re.search(r"= bf16\[([\d,]+)\]\S* copy\(", line)
    return 2 * math.prod(map(int, found[1].split(","))) if found else 0
