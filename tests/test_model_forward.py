"""The decoder's invariants, on tiny models of several features, with layers stacked and unstacked."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.model import (
    Arch,
    Level,
    Paged,
    cut_into_pages,
    forward,
    init_cache,
    init_params,
    lay_by_output,
    logits,
    param_axes,
    param_shapes,
    put_pages,
    resize_pages,
    stock_axes,
    take_pages,
    tied_scores,
    unstack_layers,
)
from pkv.model.attention import CHUNK, attend
from pkv.model.linear import ByOutput
from pkv.model.rope import Yarn

SMALL = {"vocab_size": 61, "hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_size": 8, "ffn": 48}
ARCHES = {
    "biased": Arch(**SMALL, qkv_bias=True, tied_embeddings=True, init_std=0.3),
    # Some layers local, with a base of their own; caps, post-norms, offsets.
    "local and global": Arch(
        **SMALL,
        window=4,
        local_layers=(True, False, True),
        local_rope_theta=100.0,
        query_pre_attn_scalar=5,
        attention_cap=3.0,
        logit_cap=4.0,
        norm_offset=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        tied_embeddings=True,
        init_std=0.3,
    ),
    # All layers local; queries and keys normed; a part of each head turns, scaled.
    "local": Arch(
        **SMALL,
        qk_norm=True,
        window=4,
        local_layers=(True, True, True),
        rotary_share=0.5,
        rope_scaling=Yarn(factor=4.0, original_positions=8, attention_factor=1.1),
        init_std=0.3,
    ),
}
B, T = 3, 12


@pytest.fixture(scope="module", params=ARCHES)
def arch(request):
    return ARCHES[request.param]


@pytest.fixture(scope="module")
def params(arch):
    """Random weights; biases and norms too, so that none can be left out unseen."""
    leaves, tree = jax.tree.flatten(init_params(arch, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def tokens(arch):
    return jax.random.randint(jax.random.key(2), (B, T), 0, arch.vocab_size)


def along(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def same(got, expected):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_prefill_and_decode_equal_the_full_forward(arch, params, tokens, stacked):
    full, none = forward(params, arch, tokens, along(tokens))
    assert none is None
    weights = params if stacked else unstack_layers(params, arch)
    lengths = jnp.array([3, 7, 5])  # prompts of unequal length, padded on the right with what must not matter
    prompt = jnp.where(jnp.arange(7) < lengths[:, None], tokens[:, :7], 60)
    hidden, cache = forward(weights, arch, prompt, along(prompt), cache=init_cache(arch, B, T, stacked=stacked))
    for row, length in enumerate(lengths):
        same(hidden[row, :length], full[row, :length])
    for step in range(5):
        position = lengths + step
        token = tokens[jnp.arange(B), position][:, None]
        hidden, cache = forward(weights, arch, token, position[:, None], cache=cache)
        same(hidden[:, 0], full[jnp.arange(B), position])


def test_weights_that_lie_by_output_say_the_same(arch, params, tokens):
    def said(weights):
        hidden, _ = forward(weights, arch, tokens, along(tokens))
        return logits(weights, arch, hidden)

    scores = tied_scores(params["embedding"]) if arch.tied_embeddings else {}
    for banks in (1, 2):
        laid = {**lay_by_output(unstack_layers(params, arch), banks), **scores}
        same(said(laid), said(params))
    assert isinstance(laid["unembedding"], ByOutput) and isinstance(laid["layers"][0]["attention"]["o"], ByOutput)


def test_a_product_by_output_keeps_the_weights_first():
    """As the second array they would be packed anew in every step."""
    w, x = ByOutput.of(jnp.ones((32, 48))), jnp.ones((3, 1, 32))
    text = jax.jit(ByOutput.times).lower(w, x).compile().as_text()
    assert re.search(r"f32\[48,3\]\S* dot\(", text) and not re.search(r"f32\[3,48\]\S* dot\(", text)


@pytest.mark.parametrize("one_stock", [True, False])
@pytest.mark.parametrize("stacked, banks", [(True, 1), (False, 1), (False, 2)])
def test_decode_on_pages_equals_the_full_forward(arch, params, tokens, stacked, banks, one_stock):
    """Rows read prompts' pages and their own, in no order, of two stocks or of one from both of its ends, heads in one
    bank or in two; pages that nobody reads hold what must not matter."""
    full, _ = forward(params, arch, tokens, along(tokens))
    weights = params if stacked else unstack_layers(params, arch)
    if banks > 1:
        scores = tied_scores(params["embedding"]) if arch.tied_embeddings else {}
        weights = {**lay_by_output(weights, banks), **scores}
    lengths, size = np.array([3, 7, 5]), 4
    prompt = jnp.where(jnp.arange(8) < lengths[:, None], tokens[:, :8], 60)
    _, cache = forward(weights, arch, prompt, along(prompt), cache=init_cache(arch, B, 8, stacked=stacked))
    order = np.array([5, 0, 3, 1, 4, 2])
    shared = take_pages(cut_into_pages(cache, size, banks=banks), jnp.asarray(order))
    nobody = np.array([B, B, B])
    readers = np.stack([nobody[:2], *np.stack([np.arange(B), nobody], 1).repeat(2, 0)[order]])[1:]
    start = np.tile([0, size], B)[order]
    level = Level(shared, jnp.asarray(readers), jnp.asarray(start), jnp.asarray(lengths.repeat(2)[order]))
    empty = cut_into_pages(init_cache(arch, B + 1, 8, stacked=stacked), size, banks=banks)
    own = jax.tree.map(lambda x: x + 50.0, empty)
    if one_stock:
        level = level._replace(stock=None)
        axis = 1 if stacked else 0
        own = jax.tree.map(lambda own, end: jnp.concatenate([own, own, end], axis), own, shared)
    owners, firsts = np.full(8, B), np.zeros(8, np.int32)
    pages = {0: [6, 1], 1: [0, 3], 2: [5, 7]}
    for row, numbers in pages.items():
        owners[numbers], firsts[numbers] = row, lengths[row] + size * np.arange(2)
    for step in range(5):
        position = lengths + step
        page = jnp.array([pages[row][step // size] for row in range(B)])
        table = jnp.asarray(owners[:, None]), jnp.asarray(firsts), jnp.full(8, 1000)
        paged = Paged((level, Level(own, *table)), page, jnp.full(B, step % size))
        token = tokens[jnp.arange(B), position][:, None]
        hidden, own = forward(weights, arch, token, jnp.asarray(position)[:, None], cache=paged)
        same(hidden[:, 0], full[jnp.arange(B), position])


def test_a_prefill_in_pieces_equals_one_prefill(arch, params, tokens):
    _, whole = forward(params, arch, tokens, along(tokens), cache=init_cache(arch, B, T))
    cache = init_cache(arch, B, T)
    for piece in (slice(0, 5), slice(5, 12)):
        _, cache = forward(params, arch, tokens[:, piece], along(tokens)[:, piece], cache=cache)
    jax.tree.map(same, cache, whole)


@pytest.mark.parametrize("remat", ["none", "cheap", "all"])
def test_stacked_and_unstacked_layers_say_the_same(arch, params, tokens, remat):
    def loss(params, unstacked):
        weights = unstack_layers(params, arch) if unstacked else params
        return jnp.sum(forward(weights, arch, tokens, along(tokens), remat=remat)[0] ** 2)

    def plain(params):
        return jnp.sum(forward(params, arch, tokens, along(tokens))[0] ** 2)

    value, gradient = jax.value_and_grad(plain)(params)
    for unstacked in (False, True):
        other, other_gradient = jax.value_and_grad(loss)(params, unstacked)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), other_gradient, gradient)


def felt(arch, params, tokens, at):
    """How much the hidden state at `at` changes with the input at each position of one row, [T]."""
    table = params["embedding"][tokens]  # every position its own row, so that each can be told apart

    def out(table):
        hidden, _ = forward({**params, "embedding": table}, arch, jnp.arange(T)[None], jnp.arange(T)[None])
        return jnp.sum(jnp.sin(hidden[0, at]))

    return np.abs(jax.grad(out)(table)).max(axis=-1)


def test_causality_by_gradient(arch, params, tokens):
    """What comes out at t changes with the inputs up to t and with none after it."""
    at = 6
    change = felt(arch, params, tokens[0], at)
    assert (change[: at + 1] > 1e-7).all()
    assert (change[at + 1 :] == 0).all()


def test_a_window_hides_what_lies_before_it(arch, params, tokens):
    """Through one local layer a query feels as many keys as the window holds, through two twice its reach back."""
    one = {**params, "layers": jax.tree.map(lambda weight: weight[:1], params["layers"])}
    local = arch.local_layers[:1] == (True,)
    single = dataclasses.replace(arch, layers=1, local_layers=arch.local_layers[:1])
    at = T - 1
    seen = np.flatnonzero(felt(single, one, tokens[0], at))
    assert seen.tolist() == list(range(at - 3 if local else 0, T))
    if arch.local_layers == (True, True, True):
        assert np.flatnonzero(felt(arch, params, tokens[0], at)).tolist() == list(range(at - 9, T))


def test_batch_mates_and_padding_change_nothing(arch, params, tokens):
    alone, _ = forward(params, arch, tokens[:1, :8], along(tokens[:1, :8]))
    others = tokens.at[1:].set(5).at[0, 8:].set(17)
    together, _ = forward(params, arch, others, along(others))
    same(together[:1, :8], alone)


def test_packed_equals_unpacked(arch, params, tokens):
    first, second = tokens[0, :5], tokens[1, :4]
    row = jnp.concatenate([first, second, jnp.array([9, 9, 9])])[None]
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(4), jnp.arange(3)])[None]
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    packed, _ = forward(params, arch, row, positions, segments_BT=segments)
    same(packed[0, :5], forward(params, arch, first[None], jnp.arange(5)[None])[0][0])
    same(packed[0, 5:9], forward(params, arch, second[None], jnp.arange(4)[None])[0][0])
    assert np.isfinite(packed).all()


def plainly(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, cap):
    """Attention by its definition, on repeated keys."""
    repeats = q_BTNH.shape[2] // k_BKHS.shape[1]
    scores = jnp.einsum("btnh,bnhs->bnts", q_BTNH, jnp.repeat(k_BKHS, repeats, 1)) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    shares = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", shares, jnp.repeat(v_BKSH, repeats, 1))


@pytest.mark.parametrize(("segmented", "window"), [(False, None), (True, None), (True, 5), (False, CHUNK + 7)])
def test_attention_is_what_its_definition_says(segmented, window):
    """Long rows skip the keys that no query of a piece may see: the same numbers and gradients, less work."""
    length = 2 * CHUNK + 1
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, length, 4, 8), (2, 2, 8, length), (2, 2, length, 8))
    arrays = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    back = jnp.arange(length)[:, None] - jnp.arange(length)
    segments = jnp.broadcast_to(1 + (jnp.arange(length) >= CHUNK + 3), (2, length)) if segmented else None
    mask = (back >= 0)[None]
    if segmented:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    narrow = mask if window is None else mask & (back < window)
    cap = None if window is None else 2.0

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, has_aux=True)
    def total(arrays, way):
        options = {"scale": 0.3, "cap": cap, "segments_BT": segments, "window": window}
        if way == "plain" or way == "plain, wide":
            out = plainly(*arrays, narrow if way == "plain" else mask, 0.3, cap)
        elif way == "traced":  # as in a scan over layers of both kinds
            out = jax.lax.map(lambda local: attend(*arrays, local=local, **options), jnp.array([True, False]))[0]
        else:
            out = attend(*arrays, local=way == "local", **options)
        return jnp.sum(jnp.sin(out)), out

    for ways in (("local", "traced", "plain"), ("wide", "plain, wide")):
        (_, expected), gradient = total(arrays, ways[-1])
        for way in ways[:-1]:
            (_, got), got_gradient = total(arrays, way)
            same(got, expected)
            jax.tree.map(same, got_gradient, gradient)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 5, 16])
def test_attention_over_slots_is_what_its_definition_says(queries, window):
    """One query has a way of its own on the CPU; slots beyond a query's position are never seen."""
    slots = 16
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, queries, 4, 8), (2, 2, 8, slots), (2, 2, slots, 8)), strict=True)
    )
    positions = jnp.array([[3], [11]]) + jnp.arange(queries)
    back = positions[:, :, None] - jnp.arange(slots)
    mask = (back >= 0) & ((back < window) if window else True)
    got = attend(q, k, v, scale=0.3, cap=2.0, positions_BT=positions, window=window)
    same(got, plainly(q, k, v, mask, 0.3, 2.0))


def test_positions_matter(arch, params, tokens):
    """Only differences of positions matter, and they do."""
    here = forward(params, arch, tokens, along(tokens))[0]
    same(forward(params, arch, tokens, along(tokens) + 100)[0], here)
    assert np.abs(forward(params, arch, tokens, along(tokens) * 3)[0] - here).max() > 1e-2


def test_what_lies_beyond_the_cache_is_dropped(arch, params, tokens):
    _, cache = forward(params, arch, tokens[:, :4], along(tokens[:, :4]), cache=init_cache(arch, B, 4))
    _, after = forward(params, arch, tokens[:, :1], jnp.full((B, 1), 4), cache=cache)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_every_weight_has_axes_and_a_shape(arch, params):
    axes, shapes = param_axes(arch), param_shapes(arch)
    sizes = {"layers": 3, "vocab": 61, "embed": 32, "heads": 4, "kv_heads": 2, "head": 8, "ffn": 48}
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(params)
    for names, shape, weight in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True
    ):
        assert tuple(sizes[name] for name in names) == shape.shape == weight.shape


def test_every_weight_matters(arch, params, tokens):
    def loss(params):
        return jnp.sum(jnp.sin(logits(params, arch, forward(params, arch, tokens, along(tokens))[0])))

    gradient = jax.grad(loss)(params)
    # A bias on keys adds the same to all scores of a query only without rotation; so here it matters too.
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradient))


def test_a_weight_is_drawn_for_its_name_only():
    plain, biased = Arch(**SMALL), Arch(**SMALL, qkv_bias=True, qk_norm=True)
    a, b = init_params(plain, jax.random.key(3)), init_params(biased, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, a["layers"]["ffn"], b["layers"]["ffn"])
    np.testing.assert_array_equal(a["layers"]["attention"]["o"], b["layers"]["attention"]["o"])
    assert not np.array_equal(a["layers"]["ffn"]["gate"], a["layers"]["ffn"]["up"])
    assert not np.array_equal(a["layers"]["ffn"]["gate"][0], a["layers"]["ffn"]["gate"][1])
    np.testing.assert_allclose(np.std(a["layers"]["attention"]["q"]), 0.02, rtol=0.1)
    np.testing.assert_allclose(np.std(a["layers"]["attention"]["o"]), 0.02 / 6**0.5, rtol=0.1)


def test_bfloat16_compute_stays_near_and_logits_are_32_bit(arch, params, tokens):
    hidden, cache = forward(
        params, arch, tokens, along(tokens), cache=init_cache(arch, B, T, jnp.bfloat16), dtype=jnp.bfloat16
    )
    assert hidden.dtype == jnp.bfloat16
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    exact = logits(params, arch, forward(params, arch, tokens, along(tokens))[0])
    got = logits(params, arch, hidden)
    assert got.dtype == jnp.float32
    assert np.abs(got - exact).max() < 0.1 * np.abs(exact).max()


def test_mixed_forms_are_refused(arch, params, tokens):
    with pytest.raises(ValueError, match="differ in form"):
        forward(params, arch, tokens, along(tokens), cache=init_cache(arch, B, T, stacked=False))
    with pytest.raises(ValueError, match="segments"):
        forward(params, arch, tokens, along(tokens), cache=init_cache(arch, B, T), segments_BT=tokens)


@pytest.mark.parametrize("stacked", [True, False])
def test_pages_taken_and_put_are_those_pages(arch, stacked):
    cache = init_cache(arch, 2, 6, stacked=stacked)
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), cache)
    stock, axis = cut_into_pages(cache, 3), 1 if stacked else 0
    layer, kept = (stock, cache) if stacked else (stock[0][0], cache[0])
    lead = (slice(None),) * axis
    for page, (row, at) in enumerate([(0, 0), (0, 3), (1, 0), (1, 3)]):
        np.testing.assert_array_equal(layer["k"][(*lead, page)], kept["k"][(*lead, row)][..., at : at + 3])
        np.testing.assert_array_equal(layer["v"][(*lead, page)], kept["v"][(*lead, row)][..., at : at + 3, :])
    taken = take_pages(stock, jnp.array([2, 0]))
    jax.tree.map(lambda got, x: np.testing.assert_array_equal(got, np.take(x, [2, 0], axis)), taken, stock)
    placed = put_pages(resize_pages(stock, 5), jnp.array([4, 9]), taken)  # page 9 is past the end
    expected = jax.tree.map(lambda x: np.concatenate([x, np.take(x, [2], axis)], axis), stock)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    jax.tree.map(np.testing.assert_array_equal, resize_pages(placed, 4), stock)
    named = jax.tree.leaves(stock_axes(stock), is_leaf=lambda n: isinstance(n, tuple) and "head" in n)
    sizes = {"layers": 3, "pages": 4, "kv_heads": 2, "head": 8, "time": 3}
    assert [tuple(sizes[a] for a in names) for names in named] == [x.shape for x in jax.tree.leaves(stock)]


@pytest.mark.parametrize("stacked", [True, False])
def test_a_decode_loop_never_copies_the_cache(arch, params, stacked):
    """The compiled loop updates the donated cache in place: no copy or transposition of its size, in any layer."""
    rows, length = 5, 37  # numbers that no other array has
    weights = params if stacked else unstack_layers(params, arch)
    cache = init_cache(arch, rows, length, stacked=stacked)

    def decode(weights, cache, token):
        def body(state):
            position, cache, token = state
            at = jnp.full((rows, 1), position)
            hidden, cache = forward(weights, arch, token, at, cache=cache)
            return position + 1, cache, logits(weights, arch, hidden).argmax(-1)

        return jax.lax.while_loop(lambda state: state[0] < length, body, (0, cache, token))

    program = (
        jax.jit(decode, donate_argnums=1).lower(weights, cache, jnp.zeros((rows, 1), jnp.int32)).compile().as_text()
    )
    whole = r"f32\[(3,)?5,2,(8,37|37,8)\]"
    assert re.search(whole + r"\S* scatter\(", program)  # the pattern does find the cache's updates
    assert not re.search(whole + r"\S* (copy|transpose)\(", program)
