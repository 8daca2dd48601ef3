"""What a rollout says depends on its key and the weights only, and its log-probabilities are the trainer's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make import CASES, make_model, save
from tiny_sampling import ARCH, CONFIG, MESHES, PARAMS, STOPS, assert_same, one_device, requests, run

from pkv.config import MeshConfig
from pkv.mesh import make_mesh
from pkv.model import forward, load_params, logits, read_arch
from pkv.model.pages import WRITING
from pkv.records import Verdict
from pkv.sampling import Engine, Request, row_keys
from pkv.sampling.drawing import Nucleus, _search, draw, invert

PARAMS_PLACED = Engine(ARCH, CONFIG, STOPS, one_device()).load(PARAMS)


def logprobs_by_forward(prompt, tokens, temperature: float = 1.0):
    whole = jnp.asarray(np.concatenate([prompt, tokens]))[None]
    hidden, _ = forward(PARAMS, ARCH, whole[:, :-1], jnp.arange(whole.shape[1] - 1)[None])
    table = jax.nn.log_softmax(logits(PARAMS, ARCH, hidden)[0] / temperature)
    return np.take_along_axis(np.asarray(table), np.asarray(whole[0, 1:, None]), -1)[len(prompt) - 1 :, 0]


@pytest.fixture(scope="module")
def plain():
    return run()


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


@pytest.mark.parametrize("slots, segment, page", [(1, 1, 8), (2, 5, 64), (64, 32, 128)])
def test_slots_segments_and_pages_change_nothing(plain, slots, segment, page):
    assert_same(plain, run(dataclasses.replace(CONFIG, slots=slots, segment=segment, page_tokens=page)))


def test_batch_mates_change_nothing(plain):
    alone = run(asked=[requests()[0]])
    assert_same({key: done for key, done in plain.items() if key[0] == 0}, alone)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("stacked", [False, True])
def test_one_and_eight_devices_say_the_same(monkeypatch, plain, mesh, stacked):
    if stacked:
        monkeypatch.setattr("pkv.sampling.programs.UNROLL", 0)
    assert_same(plain, run(mesh=make_mesh(mesh)))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_device_holds_its_own_pages_and_heads(monkeypatch, plain, mesh):
    engine = Engine(ARCH, CONFIG, STOPS, make_mesh(mesh))
    programs, layouts = engine.programs, set()
    decode = programs.decode

    def seen_decode(weights, shared, own, table, rows):
        stocks = [own, *(level.stock for level in shared)]
        for array in jax.tree.leaves(stocks):
            P, K, *_ = array.shape
            shards = {shard.data.shape[:2] for shard in array.addressable_shards}
            assert shards == {(P // (8 // mesh.tensor), max(1, K // mesh.tensor))}
        layouts.update((x.shape, str(x.sharding)) for x in jax.tree.leaves(stocks))
        return decode(weights, shared, own, table, rows)

    monkeypatch.setattr(programs, "decode", seen_decode)
    assert_same(plain, {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), requests())})
    assert len(layouts) == len({shape for shape, _ in layouts}), "one layout, and so one program, for each shape"


def test_the_samples_of_one_prompt_use_every_device(monkeypatch):
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=64), STOPS, make_mesh(MeshConfig(data=8)))
    asked = [requests(samples=8)[0]]
    visit, spread = engine._visit, []

    def seen(weights, schedule, *rest):
        spread.append([len(rows) for rows in schedule.live])
        return visit(weights, schedule, *rest)

    monkeypatch.setattr(engine, "_visit", seen)
    list(engine.sample(engine.load(PARAMS), asked))
    assert spread[0] == [1] * 8


@pytest.mark.parametrize("stacked", [False, True])
def test_what_all_prompts_begin_with_is_prefilled_once(monkeypatch, stacked):
    if stacked:
        monkeypatch.setattr("pkv.sampling.programs.UNROLL", 0)
    head = np.random.default_rng(1).integers(10, 200, 40).astype(np.int32)
    asked = [dataclasses.replace(one, prompt=np.concatenate([head, one.prompt])) for one in requests()]
    alone = {}
    for number, one in enumerate(asked):
        alone |= {(number, s): c for (_, s), c in run(asked=[one]).items()}
    lengths: list[int] = []
    for mesh in (one_device(), make_mesh(MESHES["all"])):
        engine = Engine(ARCH, CONFIG, STOPS, mesh)
        prefix, prefill = engine.programs.prefix, engine.programs.prefill

        def seen_prefix(weights, tokens, call=prefix):
            lengths.append(len(tokens))
            return call(weights, tokens)

        def seen_prefill(weights, start, stock, tokens, places, call=prefill):
            lengths.append(tokens.shape[1])
            return call(weights, start, stock, tokens, places)

        monkeypatch.setattr(engine.programs, "prefix", seen_prefix)
        monkeypatch.setattr(engine.programs, "prefill", seen_prefill)
        assert_same(alone, {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), asked)})
    assert lengths.count(32) == 2 and set(lengths) == {32, 64}, "whole pages of 16 once a mesh; the rest, padded"


@pytest.mark.parametrize("chunk", [16, 48])
def test_prefill_in_chunks_changes_nothing(monkeypatch, chunk):
    asked = [dataclasses.replace(one, prompt=np.tile(one.prompt, 9)) for one in requests()]
    whole = run(asked=asked)
    monkeypatch.setattr("pkv.sampling.programs.PREFILL_CHUNK", chunk)
    monkeypatch.setattr("pkv.sampling.engine.PREFILL_CHUNK", chunk)
    monkeypatch.setattr("pkv.sampling.engine.PREFILL_TOKENS", 100)
    assert_same(whole, run(asked=asked))


def test_eight_bit_keys_and_values_stay_near():
    asked = requests(samples=8)
    for (r, _), done in run(dataclasses.replace(CONFIG, kv_cache="int8"), asked).items():
        exact = logprobs_by_forward(asked[r].prompt, done.tokens)
        off = np.abs(done.policy_logprobs - exact)  # nats, of random weights whose logits have a deviation of 3
        assert off.mean() < 0.05 and off.max() < 0.5


def test_eight_bit_keys_and_values_are_the_same_on_every_mesh():
    config = dataclasses.replace(CONFIG, kv_cache="int8")
    assert_same(run(config), run(config, mesh=make_mesh(MESHES["all"])))


class Script:
    """A watch that cuts after its third token, forces two, and ends the row at ten."""

    def __init__(self) -> None:
        self.said, self.cut = 0, False

    def __call__(self, tokens: np.ndarray) -> Verdict:
        self.said += len(tokens)
        if not self.cut and self.said >= 3:
            keep, self.said, self.cut = len(tokens) - (self.said - 3), 3, True
            return Verdict(keep, np.array([150, STOPS[0]], np.int32), False)
        if self.said >= 10:
            return Verdict(len(tokens) - (self.said - 10), np.zeros(0, np.int32), True)
        return Verdict(len(tokens), np.zeros(0, np.int32), False)


@pytest.mark.parametrize("segment, mesh", [(1, None), (4, None), (32, None), (4, MESHES["all"])])
def test_a_watch_cuts_forces_and_ends(segment, mesh):
    asked = [dataclasses.replace(one, watch=Script, max_new_tokens=20) for one in requests()]
    mesh = one_device() if mesh is None else make_mesh(mesh)
    engine = Engine(ARCH, dataclasses.replace(CONFIG, segment=segment), (), mesh)
    heard: dict[tuple[int, int], list[int]] = {}
    found = list(
        engine.sample(engine.load(PARAMS), asked, lambda r, s, new: heard.setdefault((r, s), []).extend(new.tolist()))
    )
    free = {(c.request, c.sample): c for c in Engine(ARCH, CONFIG, (), one_device()).sample(PARAMS_PLACED, requests())}
    assert len(found) == 12
    for done in found:
        assert done.finish == "stop" and len(done.tokens) == 10 and done.tokens[3:5].tolist() == [150, STOPS[0]]
        np.testing.assert_array_equal(done.forced, np.isin(np.arange(10), [3, 4]))
        np.testing.assert_array_equal(done.tokens[:3], free[done.request, done.sample].tokens[:3])
        assert heard[done.request, done.sample] == done.tokens.tolist()
        exact = logprobs_by_forward(asked[done.request].prompt, done.tokens)
        np.testing.assert_allclose(done.policy_logprobs, exact, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_pages_as_tpu_writes_them_say_the_same(monkeypatch, stacked, kv_cache):
    if stacked:
        monkeypatch.setattr("pkv.sampling.programs.UNROLL", 0)
    config = dataclasses.replace(CONFIG, kv_cache=kv_cache)
    by_positions = run(config)
    monkeypatch.setitem(WRITING, "default", WRITING["tpu"])
    assert_same(by_positions, run(config))


def test_scanned_and_unrolled_layers_say_the_same(monkeypatch, plain):
    monkeypatch.setattr("pkv.sampling.programs.UNROLL", 0)
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


def test_in_bf16_the_logprobs_stay_near_the_trainers():
    """Of a model that computes in 16 bits: decode and the trainer's forward round at other places."""
    engine = Engine(ARCH, CONFIG, STOPS, one_device(), "bfloat16")
    off = []
    for done in engine.sample(engine.load(PARAMS), requests(samples=8)):
        whole = jnp.asarray(np.concatenate([requests()[done.request].prompt, done.tokens]))[None]
        where = jnp.arange(whole.shape[1] - 1)[None]
        hidden, _ = forward(PARAMS, ARCH, whole[:, :-1], where, dtype=jnp.bfloat16)
        table = jax.nn.log_softmax(logits(PARAMS, ARCH, hidden)[0])
        trainers = np.take_along_axis(np.asarray(table), np.asarray(whole[0, 1:, None]), -1)[-len(done.tokens) :, 0]
        off.append(np.abs(done.policy_logprobs - trainers))
    off = np.concatenate(off)
    assert off.mean() < 0.02 and off.max() < 0.3  # nats; 32 bits: 1e-4, see above


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_greedy_is_transformers_generate(tmp_path, family):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save(make_model(family, CASES[family]["golden"], seed=3), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    arch = read_arch(str(tmp_path))
    draw, keys = np.random.default_rng(0), row_keys(0, "greedy", 0, ["a", "b", "c"], 2)
    prompts = [draw.integers(3, arch.vocab_size, size).astype(np.int32) for size in (5, 60, 33)]
    asked = [Request(prompt, key, 64) for prompt, key in zip(prompts, keys, strict=True)]
    engine = Engine(arch, dataclasses.replace(CONFIG, temperature=0.0), (), one_device())
    weights = engine.load(load_params(tmp_path, arch, jnp.float32))
    for done in engine.sample(weights, asked):
        prompt = torch.tensor(prompts[done.request][None].astype(np.int64))
        plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        with torch.no_grad():
            whole = model.generate(prompt, max_new_tokens=64, **plain)
        np.testing.assert_array_equal(done.tokens, whole[0, prompt.shape[1] :].numpy())


def test_another_step_draws_another_text(plain):
    prompt = requests()[0].prompt
    other = run(asked=[Request(prompt, row_keys(0, "test", 8, ["problem 0"], 4)[0], 20)])
    assert any(not np.array_equal(other[0, s].tokens, plain[0, s].tokens) for s in range(4))


def test_calls_of_one_engine_that_are_open_together_change_nothing_of_each_other(plain):
    engine = Engine(ARCH, CONFIG, STOPS, one_device())
    weights, used = engine.load(PARAMS), []
    for asked in (requests(), requests()[:1]):
        list(engine.sample(weights, asked))
        used.append(engine.usage)
    first, second = (engine.sample(weights, asked) for asked in (requests(), requests()[:1]))
    found, usage = [next(first)], engine.usage
    other = list(second)
    found += first
    assert (usage, engine.usage) == tuple(used) and used[0] != used[1]
    assert_same(plain, {(c.request, c.sample): c for c in found})
    assert_same({key: done for key, done in plain.items() if key[0] == 0}, {(c.request, c.sample): c for c in other})


def test_keys_of_no_samples_have_their_shape():
    assert row_keys(0, "none", 0, ["a", "b"], 0).shape == (2, 0, 2) and row_keys(0, "none", 0, [], 3).shape == (0, 3, 2)


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


def test_a_long_vocabulary_never_draws_what_has_no_probability():
    """The running sum over 1,187 blocks is added in a tree, and rises by a rounding where a block's weight is 0."""
    random, V = np.random.default_rng(0), 151_936
    for uniforms in ([], [0.6928966], [0.63166094], [0.6846694, 0.8361306]):
        kept, shares = random.choice(V, 50, replace=False), random.random(50) ** 3
        weights = jnp.zeros(V).at[kept].set(jnp.asarray(shares / shares.sum(), jnp.float32))
        probabilities = jax.nn.softmax(jnp.log(weights))
        for uniform in (*uniforms, np.nextafter(np.float32(1), np.float32(0))):
            token = int(jax.jit(invert)(probabilities[None], jnp.full(1, uniform, jnp.float32))[0])
            assert token in kept and probabilities[token] > 0


@pytest.mark.parametrize("weights, drawn", [([0, 2, 0, 3, 0], 3), ([5, 1, 0, 0, 0], 1), ([0, 0, 4, 0, 0], 2)])
def test_a_target_that_no_running_sum_exceeds_draws_the_last_with_weight(weights, drawn):
    weights = jnp.asarray([weights], jnp.float32)
    index, rest = _search(weights, weights.sum(axis=-1))
    assert int(index[0]) == drawn and float(rest[0]) == float(weights[0, drawn])


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
