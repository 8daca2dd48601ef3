"""A tiny engine for tests: two layers, three prompts, and every mesh of eight devices."""

from __future__ import annotations

import jax
import numpy as np

from pkv.config import MeshConfig, SamplingConfig
from pkv.mesh import make_mesh
from pkv.model import Arch, init_params
from pkv.sampling import Engine, Request, row_keys

ARCH = Arch(
    vocab_size=200, hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, ffn=32, tied_embeddings=True, init_std=0.5
)
PARAMS = init_params(ARCH, jax.random.key(0))
STOPS = (3, 4, 5, 6, 7, 8)
CONFIG = SamplingConfig(slots=8, segment=4, page_tokens=16)
MESHES = {
    "data": MeshConfig(data=8),
    "all but sequence": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=1, sequence=8),
    "all": MeshConfig(data=2, sequence=2, tensor=2),
    "more devices than key-value heads": MeshConfig(data=1, sequence=2, tensor=4),
}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def requests(limits=(20, 3, 11), samples: int = 4) -> list[Request]:
    draw = np.random.default_rng(0)
    keys = row_keys(0, "test", 7, [f"problem {i}" for i in range(len(limits))], samples)
    prompts = [draw.integers(10, 200, size).astype(np.int32) for size in (5, 33, 2)]
    return [Request(p, k, limit) for p, k, limit in zip(prompts, keys, limits, strict=True)]


def run(config=CONFIG, asked=None, mesh=None, arch=ARCH, params=PARAMS, **kwargs):
    engine = Engine(arch, config, STOPS, mesh or one_device())
    done = list(engine.sample(engine.load(params), asked or requests(), **kwargs))
    return {(c.request, c.sample): c for c in done}


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key].tokens, b[key].tokens)
        np.testing.assert_allclose(a[key].logprobs, b[key].logprobs, atol=1e-4)
        assert a[key].finish == b[key].finish
