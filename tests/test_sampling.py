"""What a rollout says depends on its key and the weights only, and its log-probabilities are the trainer's."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make import CASES, make_model, save
from tiny_sampling import ARCH, CONFIG, MESHES, PARAMS, STOPS, assert_same, one_device, requests, run

from pkv.competition import Tokenizer, train_tokenizer
from pkv.competition.watch import stop_strings
from pkv.config import LoraConfig, MeshConfig
from pkv.evaluate.measures import policy_kl
from pkv.grpo import Sequence, pack
from pkv.grpo.packing import Layout
from pkv.mesh import make_mesh
from pkv.model import forward, freezer, init_adapters, init_params, join, load_params, logits, read_arch
from pkv.model.pages import WRITING
from pkv.records import Rollout, Verdict
from pkv.sampling import Engine, Request, row_keys
from pkv.sampling.laying import form_of

PARAMS_PLACED = Engine(ARCH, CONFIG, STOPS, one_device()).load(PARAMS)


@partial(jax.jit, static_argnames="dtype")
def trainers_logits(tokens_BT: jax.Array, dtype) -> jax.Array:
    B, T = tokens_BT.shape
    hidden, _ = forward(PARAMS, ARCH, tokens_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), dtype=dtype)
    return logits(PARAMS, ARCH, hidden)


def logits_by_forward(prompt, tokens, dtype=jnp.float32) -> np.ndarray:
    """The trainer's logits where each of the tokens was drawn, [T, V]; padded on the right to one shape."""
    whole = np.zeros((1, 64), np.int32)
    whole[0, : len(prompt) + len(tokens)] = np.concatenate([prompt, tokens])
    found = trainers_logits(whole, dtype)[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1]
    return np.asarray(found, np.float64)


def log_softmax(table_TV: np.ndarray) -> np.ndarray:
    table_TV = table_TV - table_TV.max(axis=-1, keepdims=True)
    return table_TV - np.log(np.exp(table_TV).sum(axis=-1, keepdims=True))


def logprobs_by_forward(prompt, tokens, temperature: float = 1.0, dtype=jnp.float32):
    table = log_softmax(logits_by_forward(prompt, tokens, dtype) / temperature)
    return np.take_along_axis(table, tokens[:, None], -1)[:, 0]


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
        monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    assert_same(plain, run(mesh=make_mesh(mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["plain", "nf4 with adapters"])
def test_layers_apart_as_on_a_gpu_say_the_same(monkeypatch, base):
    """Also of a model with few bits and adapters, whose parts go apart together."""
    params = PARAMS if base == "plain" else lora_of(PARAMS)
    expected = run(params=params)
    monkeypatch.setattr("pkv.sampling.programs.form_of", lambda *_, **__: "apart")
    engine = Engine(ARCH, CONFIG, STOPS, one_device())
    weights = engine.load(params)
    assert len(weights["layers"]) == ARCH.layers and weights["embedding"] is params["embedding"]
    assert_same(expected, {(c.request, c.sample): c for c in engine.sample(weights, requests())})


def lora_of(params):
    lora = LoraConfig(rank=2, base="nf4")
    keep = freezer(ARCH, "nf4")
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, weight: keep(jax.tree_util.keystr(path, simple=True, separator="."), weight), params
    )
    adapters = init_adapters(ARCH, lora, jax.random.key(3))
    return join(jax.tree.map(lambda a: a + 0.05, adapters), frozen)


@pytest.mark.parametrize(
    "platform, memory, layers, form",
    [
        ("gpu", 80e9, 48, "apart"),
        ("gpu", 1e4, 2, "stacked"),
        ("gpu", None, 2, "apart"),
        ("gpu", 80e9, 200, "stacked"),
        ("tpu", 80e9, 8, "apart"),
        ("tpu", 80e9, 48, "stacked"),
        ("cpu", 80e9, 8, "by output"),
        ("cpu", 80e9, 48, "stacked"),
    ],
)
def test_layers_lie_apart_where_that_is_faster_and_there_is_room(platform, memory, layers, form):
    stats = lambda: None if memory is None else {"bytes_limit": memory}  # noqa: E731
    device = SimpleNamespace(platform=platform, memory_stats=stats)
    mesh = SimpleNamespace(devices=np.array([device]), shape={"tensor": 1})
    assert form_of(dataclasses.replace(ARCH, layers=layers), mesh, "bfloat16") == form


def test_what_decoding_must_read_is_counted_by_hand():
    """Four samples of a prompt of 5 tokens, three steps: 4 positions of the prompt in each, of own ones 1, 2 and 3."""
    asked = dataclasses.replace(requests()[0], max_new_tokens=3)
    engine = Engine(ARCH, dataclasses.replace(CONFIG, segment=2), (), one_device())
    assert len(list(engine.sample(engine.load(PARAMS), [asked]))) == 4
    a_position = engine.programs.page_bytes() / engine.programs.page
    assert (engine.usage.steps, engine.usage.read_bytes) == (3, (3 * 4 + 4 * (1 + 2 + 3)) * a_position)


def off_the_draw(asked: Request, done, dtype) -> np.ndarray:
    """How far each token's part of the unit interval, by the trainer's forward, lies from the number drawn there."""
    start, T = len(asked.prompt), len(done.tokens)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.wrap_key_data(asked.keys[done.sample]), jnp.arange(start, start + T)
    )
    drawn = np.asarray(jax.vmap(jax.random.uniform)(keys), np.float64)
    above = np.exp(log_softmax(logits_by_forward(asked.prompt, done.tokens, dtype))).cumsum(axis=-1)
    above = np.pad(above, ((0, 0), (1, 0)))
    low, high = above[np.arange(T), done.tokens], above[np.arange(T), done.tokens + 1]
    return np.maximum(0, np.maximum(low - drawn, drawn - high))


@pytest.mark.parametrize(
    "mesh, dtype, margin",
    [(None, "float32", 1e-5), (None, "bfloat16", 0.03), (MESHES["all"], "bfloat16", 0.03)],
    ids=["one device", "one device, bf16", "all, bf16"],
)
def test_every_token_is_what_its_key_draws_within_a_margin(mesh, dtype, margin):
    """So rows of two meshes part only where the number drawn lies that near to the border between two tokens."""
    asked = requests()
    engine = Engine(ARCH, CONFIG, STOPS, make_mesh(mesh) if mesh else one_device(), dtype)
    off = [off_the_draw(asked[c.request], c, jnp.dtype(dtype)) for c in engine.sample(engine.load(PARAMS), asked)]
    assert np.concatenate(off).max() < margin


@pytest.mark.parametrize(
    ("cores", "devices", "heads", "banks"), [(4, 1, 2, 2), (2, 1, 6, 2), (1, 1, 2, 1), (8, 8, 2, 1)]
)
def test_heads_lie_in_as_many_banks_as_the_cores_of_a_device(monkeypatch, cores, devices, heads, banks):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    arch, mesh = dataclasses.replace(ARCH, heads=12, kv_heads=heads), make_mesh(MeshConfig(), jax.devices()[:devices])
    layer = Engine(arch, CONFIG, STOPS, mesh).programs.stock_shapes(1)[0]
    assert [bank["k"].shape[1] for bank in layer] == [heads // banks] * banks


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


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_what_all_prompts_begin_with_is_prefilled_once(monkeypatch, stacked):
    if stacked:
        monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
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


def test_a_prompt_by_itself_reads_what_all_prompts_begin_with_if_that_is_known(monkeypatch):
    """As refills do: with no programs of their own, and the same tokens."""
    head = np.random.default_rng(1).integers(10, 200, 40).astype(np.int32)
    asked = [dataclasses.replace(one, prompt=np.concatenate([head, one.prompt])) for one in requests()]
    engine, lengths = Engine(ARCH, CONFIG, STOPS, one_device(), beginning=head), []
    prefix = engine.programs.prefix

    def seen(weights, tokens):
        lengths.append(len(tokens))
        return prefix(weights, tokens)

    monkeypatch.setattr(engine.programs, "prefix", seen)
    weights = engine.load(PARAMS)
    together = {(c.request, c.sample): c for c in engine.sample(weights, asked)}
    for number, one in enumerate(asked):
        assert_same(run(asked=[one]), alone := {(0, c.sample): c for c in engine.sample(weights, [one])})
        assert_same(alone, {(0, s): c for (r, s), c in together.items() if r == number})
    assert lengths == [32] * 4
    assert list(engine.sample(weights, [])) == []


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


@pytest.mark.slow
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


def test_what_the_filters_would_not_have_drawn_can_be_forced_and_trained_beside():
    """Its log-probability is -inf, which no number that the trainer or a log sees may come from."""
    asked = [dataclasses.replace(one, watch=Script, max_new_tokens=20) for one in requests()]
    rollouts, packed = [], []
    for done in run(dataclasses.replace(CONFIG, top_k=2), asked).values():
        np.testing.assert_array_equal(np.isneginf(done.logprobs), done.forced & np.isneginf(done.logprobs))
        rollouts.append(Rollout("p", 0, done.tokens, done.logprobs, done.policy_logprobs, "stop", forced=done.forced))
        ones = np.ones(len(done.tokens), np.float32)
        packed.append(Sequence(asked[done.request].prompt, done.tokens, ones, done.logprobs, done.forced))
    assert any(np.isneginf(one.logprobs).any() for one in rollouts), "the case must show it"
    for batch in pack(packed, Layout(64, 4)):
        assert all(np.isfinite(array).all() for array in vars(batch).values())
        assert batch.mask.sum() > 0
    assert all(np.isfinite(policy_kl(one)) for one in rollouts)
    nothing = dataclasses.replace(rollouts[0], forced=np.ones(len(rollouts[0].tokens), bool))
    assert policy_kl(nothing) is None


@pytest.mark.parametrize("segment", [1, 4, 32])
def test_a_stop_string_over_the_border_of_a_segment_ends_its_row_there(tmp_path, segment):
    train_tokenizer(["How many hives make 20 candles?"], 300, tmp_path)
    tokenizer, arch = Tokenizer.load(tmp_path, light=True), dataclasses.replace(ARCH, vocab_size=300)
    engine = Engine(arch, dataclasses.replace(CONFIG, segment=segment, slots=16), (), one_device())
    weights = engine.load(init_params(arch, jax.random.key(0)))
    asked = requests((24, 24, 24), samples=16)
    seen = 0
    for free in list(engine.sample(weights, asked)):
        tokens = free.tokens.tolist()
        before, both = tokenizer.decode(tokens[:4]), tokenizer.decode(tokens[:5])
        string = both[len(before) - 2 :]
        if "\ufffd" in both or len(string) < 3:
            continue
        ends = next(t for t in range(1, 6) if string in tokenizer.decode(tokens[:t]))
        one = dataclasses.replace(
            asked[free.request],
            keys=asked[free.request].keys[free.sample : free.sample + 1],
            watch=stop_strings(tokenizer, [string]),
        )
        (done,) = engine.sample(weights, [one])
        assert done.finish == "stop" and done.tokens.tolist() == tokens[:ends]
        seen += ends == 5
    assert seen, "the case must show it"


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_pages_as_tpu_writes_them_say_the_same(monkeypatch, stacked, kv_cache):
    if stacked:
        monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    config = dataclasses.replace(CONFIG, kv_cache=kv_cache)
    by_positions = run(config)
    monkeypatch.setitem(WRITING, "default", WRITING["tpu"])
    assert_same(by_positions, run(config))


def test_scanned_and_unrolled_layers_say_the_same(monkeypatch, plain):
    monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    assert_same(plain, run())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(temperature):
    asked = requests()
    for (r, _), done in run(dataclasses.replace(CONFIG, temperature=temperature)).items():
        np.testing.assert_allclose(
            done.logprobs, logprobs_by_forward(asked[r].prompt, done.tokens, temperature), atol=1e-4
        )
        np.testing.assert_allclose(done.policy_logprobs, logprobs_by_forward(asked[r].prompt, done.tokens), atol=1e-4)


def kept_by_hand(logprobs_V: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Token by token, the likeliest first."""
    likeliest = np.argsort(-logprobs_V)[: top_k or None]
    shares = np.exp(logprobs_V[likeliest]) / np.exp(logprobs_V[likeliest]).sum()
    kept, held = [], 0.0
    for token, share in zip(likeliest.tolist(), shares.tolist(), strict=True):
        if held >= top_p or share < min_p * shares[0]:
            break
        kept.append(token)
        held += share
    return kept


@pytest.mark.parametrize(
    "temperature, filters",
    [
        (0.7, {"top_k": 5}),
        (1.0, {"top_p": 0.8}),
        (1.3, {"min_p": 0.1}),
        (0.7, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_logprobs_are_the_trainers_under_the_same_filters(temperature, filters):
    asked, cut = requests(samples=6), 0
    for (r, _), done in run(dataclasses.replace(CONFIG, temperature=temperature, **filters), asked).items():
        table_TV = log_softmax(logits_by_forward(asked[r].prompt, done.tokens) / temperature)
        for t, token in enumerate(done.tokens.tolist()):
            kept = kept_by_hand(table_TV[t], **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters))
            assert token in kept
            whole = np.log(np.exp(table_TV[t, kept]).sum())
            cut += whole < np.log(0.95)
            np.testing.assert_allclose(done.logprobs[t], table_TV[t, token] - whole, atol=1e-4)
        np.testing.assert_allclose(done.policy_logprobs, logprobs_by_forward(asked[r].prompt, done.tokens), atol=1e-4)
    assert cut, "the case must show that something is cut off"


def test_greedy_is_the_argmax_of_the_full_forward():
    asked = requests(samples=2)
    for (r, _), done in run(dataclasses.replace(CONFIG, temperature=0.0), asked).items():
        np.testing.assert_array_equal(done.tokens, logits_by_forward(asked[r].prompt, done.tokens).argmax(-1))


def test_in_bf16_the_logprobs_stay_near_the_trainers():
    """Of a model that computes in 16 bits: decode and the trainer's forward round at other places."""
    engine = Engine(ARCH, CONFIG, STOPS, one_device(), "bfloat16")
    off = []
    for done in engine.sample(engine.load(PARAMS), requests(samples=8)):
        trainers = logprobs_by_forward(requests()[done.request].prompt, done.tokens, dtype=jnp.bfloat16)
        off.append(np.abs(done.policy_logprobs - trainers))
    off = np.concatenate(off)
    assert off.mean() < 0.02 and off.max() < 0.3  # nats; 32 bits: 1e-4, see above


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
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
