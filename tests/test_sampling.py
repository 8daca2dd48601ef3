"""What a rollout says depends on its key and the weights only, and its log-probabilities are the trainer's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import MeshConfig, SamplingConfig
from pkv.mesh import make_mesh
from pkv.model import Arch, forward, init_params, logits
from pkv.sampling import Engine, Request, row_keys
from pkv.sampling.drawing import Nucleus, draw, invert

ARCH = Arch(
    vocab_size=200, hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, ffn=32, tied_embeddings=True, init_std=0.5
)
PARAMS = init_params(ARCH, jax.random.key(0))
STOPS = (3, 4, 5, 6, 7, 8)
CONFIG = SamplingConfig(slots=8, segment=4, cache_block=16)


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


def logprobs_by_forward(prompt, tokens, temperature: float = 1.0):
    whole = jnp.asarray(np.concatenate([prompt, tokens]))[None]
    hidden, _ = forward(PARAMS, ARCH, whole[:, :-1], jnp.arange(whole.shape[1] - 1)[None])
    table = jax.nn.log_softmax(logits(PARAMS, ARCH, hidden)[0] / temperature)
    return np.take_along_axis(np.asarray(table), np.asarray(whole[0, 1:, None]), -1)[len(prompt) - 1 :, 0]


@pytest.fixture(scope="module")
def plain():
    return run()


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key].tokens, b[key].tokens)
        np.testing.assert_allclose(a[key].logprobs, b[key].logprobs, atol=1e-4)
        assert a[key].finish == b[key].finish


def test_every_sample_comes_back_once_within_its_budget(plain):
    asked = requests()
    assert set(plain) == {(r, s) for r in range(3) for s in range(4)}
    for (r, _), done in plain.items():
        assert 1 <= len(done.tokens) <= asked[r].max_new_tokens
        assert not np.isin(done.tokens[:-1], STOPS).any()
        assert (done.finish == "stop") == bool(np.isin(done.tokens[-1], STOPS))
        if done.finish == "length":
            assert len(done.tokens) == asked[r].max_new_tokens
    assert {done.finish for done in plain.values()} == {"stop", "length"}, "the case must show both"


def test_samples_of_a_group_differ(plain):
    assert len({plain[0, s].tokens.tobytes() for s in range(4)}) > 1


@pytest.mark.parametrize("slots, segment, block", [(1, 1, 8), (2, 5, 64), (64, 32, 128)])
def test_slots_segments_and_cache_blocks_change_nothing(plain, slots, segment, block):
    assert_same(plain, run(dataclasses.replace(CONFIG, slots=slots, segment=segment, cache_block=block)))


def test_batch_mates_change_nothing(plain):
    alone = run(asked=[requests()[0]])
    assert_same({key: done for key, done in plain.items() if key[0] == 0}, alone)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_one_and_eight_devices_say_the_same(plain, mesh):
    assert_same(plain, run(mesh=make_mesh(mesh)))


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_every_device_prefills_its_own_prompts_and_a_shape_has_one_layout(monkeypatch, plain, mesh):
    engine = Engine(ARCH, CONFIG, STOPS, make_mesh(mesh))
    asked, prefill, decode, layouts, caches = requests(), engine._prefill, engine._decode, set(), []

    def seen_prefill(weights, tokens):
        caches.append(prefill(weights, tokens))
        return caches[-1]

    def seen_decode(weights, rows, *scalars, **steps):
        layouts.update((x.shape, str(x.sharding)) for x in jax.tree.leaves(rows))
        return decode(weights, rows, *scalars, **steps)

    monkeypatch.setattr(engine, "_prefill", seen_prefill)
    monkeypatch.setattr(engine, "_decode", seen_decode)
    assert_same(plain, {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), asked)})
    ways, tensor = mesh.data * mesh.fsdp, mesh.tensor
    for array in jax.tree.leaves(caches):
        P, K, *_ = array.shape
        assert {shard.data.shape[:2] for shard in array.addressable_shards} == {(P // ways, K // tensor)}
    vectors = [place for shape, place in layouts if len(shape) == 1]
    assert vectors and len(set(vectors)) == 1 and "PartitionSpec()" not in vectors[0]


def test_scanned_and_unrolled_layers_say_the_same(monkeypatch, plain):
    monkeypatch.setattr("pkv.sampling.engine.UNROLL", 0)
    assert_same(plain, run())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(temperature):
    asked = requests()
    for (r, _), done in run(dataclasses.replace(CONFIG, temperature=temperature)).items():
        np.testing.assert_allclose(
            done.logprobs, logprobs_by_forward(asked[r].prompt, done.tokens, temperature), atol=1e-4
        )
        np.testing.assert_allclose(done.policy_logprobs, logprobs_by_forward(asked[r].prompt, done.tokens), atol=1e-4)


def test_greedy_is_the_argmax_of_the_full_forward():
    asked = requests(samples=2)
    for (r, _), done in run(dataclasses.replace(CONFIG, temperature=0.0), asked).items():
        whole = jnp.asarray(np.concatenate([asked[r].prompt, done.tokens]))[None]
        hidden, _ = forward(PARAMS, ARCH, whole[:, :-1], jnp.arange(whole.shape[1] - 1)[None])
        best = jnp.argmax(logits(PARAMS, ARCH, hidden)[0], -1)[len(asked[r].prompt) - 1 :]
        np.testing.assert_array_equal(done.tokens, best)


def test_another_step_draws_another_text(plain):
    prompt = requests()[0].prompt
    other = run(asked=[Request(prompt, row_keys(0, "test", 8, ["problem 0"], 4)[0], 20)])
    assert any(not np.array_equal(other[0, s].tokens, plain[0, s].tokens) for s in range(4))


def test_streamed_tokens_add_up_to_the_completions(plain):
    heard: dict[tuple[int, int], list[int]] = {}
    done = run(on_tokens=lambda r, s, tokens: heard.setdefault((r, s), []).extend(tokens.tolist()))
    assert heard == {key: c.tokens.tolist() for key, c in done.items()}


def test_draws_follow_the_distribution():
    weights = np.random.default_rng(0).random(300) ** 4
    weights[::3] = 0
    probabilities = weights / weights.sum()
    N = 40_000
    drawn = np.asarray(
        invert(jnp.broadcast_to(jnp.asarray(probabilities, jnp.float32), (N, 300)), (jnp.arange(N) + 0.5) / N)
    )
    counts = np.bincount(drawn, minlength=300)
    assert not counts[probabilities == 0].any()
    np.testing.assert_allclose(counts / N, probabilities, atol=3 / N)


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_unit_interval_never_draw_what_has_no_probability(uniform):
    probabilities = jnp.zeros((1, 300)).at[0, jnp.array([7, 250])].set(0.5)
    assert int(invert(probabilities, jnp.full(1, uniform))[0]) in (7, 250)


def test_top_k_top_p_and_min_p_keep_what_they_say():
    off = jnp.float32(0)
    table = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]])).repeat(4000, 0)
    keys = jnp.asarray(row_keys(0, "draw", 0, [f"{i}" for i in range(40)], 100).reshape(-1, 2))
    args = (table, keys, jnp.zeros(4000, jnp.int32), jnp.float32(1))
    by_k = draw(Nucleus(True, 3), *args, jnp.float32(1), off)
    assert set(np.unique(by_k.tokens)) == {0, 1, 2}
    by_p = draw(Nucleus(True, 0), *args, jnp.float32(0.7), off)
    assert set(np.unique(by_p.tokens)) == {0, 1}, "the token that crosses 0.7 is kept"
    np.testing.assert_allclose(by_p.logprobs, np.log(np.array([2 / 3, 1 / 3]))[np.asarray(by_p.tokens)], rtol=1e-5)
    np.testing.assert_allclose(by_p.policy_logprobs, np.log(np.array([0.5, 0.25]))[np.asarray(by_p.tokens)], rtol=1e-5)
    by_m = draw(Nucleus(True, 0), *args, jnp.float32(1), jnp.float32(0.25))
    assert set(np.unique(by_m.tokens)) == {0, 1, 2}, "0.15 is more than a quarter of 0.5, 0.1 is less"
    np.testing.assert_allclose(by_m.logprobs, np.log(np.array([50, 25, 15]) / 90)[np.asarray(by_m.tokens)], rtol=1e-5)
