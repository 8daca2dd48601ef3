"""Configs as they are released read into the right Arch, are written in words that read back, and hide nothing."""

import copy
import dataclasses

import pytest
from released_configs import LONGROPE, LONGROPE_BLOCK, QWEN, RELEASED, YARN_BLOCK, but

from pkv.config import UserError
from pkv.model import stretched
from pkv.model.families import FAMILIES, family_of
from pkv.model.rope import Linear

NAMES = [*RELEASED]


@pytest.mark.parametrize("name", NAMES)
def test_a_released_config_reads_as_what_it_is(name):
    config, arch = RELEASED[name]
    assert family_of(config).read(config) == arch
    assert hash(arch)  # a static argument of jax.jit


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back(name):
    config, arch = RELEASED[name]
    assert family_of(config).read(family_of(config).write(arch)) == arch


@pytest.mark.parametrize("name", [name for name in NAMES if "early" not in name])  # which transformers 5 refuses
def test_both_generations_of_configs_read_alike(name):
    """What transformers 5 makes of a released config, and saves, is the same model."""
    transformers = pytest.importorskip("transformers")
    config, arch = copy.deepcopy(RELEASED[name])
    kind = transformers.AutoConfig.for_model(config.pop("model_type"))
    assert family_of(config | {"model_type": kind.model_type}).read(type(kind)(**config).to_dict()) == arch


@pytest.mark.parametrize("name", NAMES)
def test_what_older_versions_wrote_of_generation_changes_nothing(name):
    config, arch = RELEASED[name]
    said = {"temperature": 1.0, "top_k": 50, "num_beams": 1, "max_length": 20, "pruned_heads": {}, "is_decoder": False}
    assert family_of(config).read(config | said) == arch


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_writes_what_it_has_no_words_for(family):
    """An Arch with one strange feature is refused by name; an Arch that is written reads back."""
    arch = next(arch for config, arch in RELEASED.values() if config["model_type"] == family)
    written = {}
    words = {"rotary_share": "partial_rotary_factor", "rope_scaling": "rope_type"}
    words |= {"attention_cap": "attn_logit_softcapping"} if family == "gemma3_text" else {}
    strange = {
        "qkv_bias": not arch.qkv_bias,
        "qk_norm": not arch.qk_norm,
        "norm_offset": not arch.norm_offset,
        "post_norms": not arch.post_norms,
        "activation": "silu" if arch.activation == "gelu_tanh" else "gelu_tanh",
        "scaled_embedding": not arch.scaled_embedding,
        "rope_scaling": Linear(2.0) if family == "phi3" else LONGROPE,
        "rotary_share": 0.5,
        "attention_cap": 7.0,
        "logit_cap": 7.0,
        "local_rope_theta": 77.0,
    }
    for feature, value in strange.items():
        try:
            written[feature] = FAMILIES[family].read(FAMILIES[family].write(but(arch, **{feature: value})))
        except UserError as error:
            assert words.get(feature, feature) in str(error)
    expected = {"gemma2": {"attention_cap", "logit_cap"}, "gemma3_text": {"logit_cap", "local_rope_theta"}}
    assert written.keys() == expected.get(family, {"rotary_share"} if family == "phi3" else set())
    assert all(got == but(arch, **{feature: strange[feature]}) for feature, got in written.items())


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("Llama-3.1-8B", {"attention_bias": True}, "attention_bias: True"),
        ("Llama-3.1-8B", {"mlp_bias": True}, "mlp_bias: True"),
        ("Llama-3.1-8B", {"rope_interleaved": True}, "rope_interleaved: True"),
        ("Llama-3.1-8B", {"pruned_heads": {"1": [0]}}, "unknown feature pruned_heads"),
        ("Llama-3.1-8B", {"quantization_config": {"bits": 4}}, "unknown feature quantization_config"),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor: got 0"),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1.0}}, "unknown feature beta"),
        ("Llama-3.1-8B", {"rope_parameters": {"rope_type": "default"}}, "both rope_scaling and rope_parameters"),
        ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "unknown feature partial_rotary_factor"),
        (
            "Qwen3-8B",
            {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 36},
            "without a sliding_window",
        ),
        ("Qwen3-8B", {"layer_types": ["chunked_attention"] * 36}, "layer_types: .*chunked"),
        ("Qwen3-8B", {"layer_types": ["full_attention"] * 35}, "each of 36 layers"),
        ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation: 'gelu'"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-1b-it", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        (
            "Phi-3-mini-128k",
            {"rope_scaling": {**LONGROPE_BLOCK, "long_factor": [1.0]}},
            "48 and 1 numbers; .* 48",
        ),
        (
            "Phi-3-mini-128k",
            {"rope_scaling": {**LONGROPE_BLOCK, "long_factor": ["a"] * 48}},
            "expected numbers above 0",
        ),
        ("Phi-3-mini-128k", {"original_max_position_embeddings": 1}, "expected at least 2"),
        ("Phi-3-mini-128k", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("Phi-4-mini", {"interpolate_factor": 2}, "interpolate_factor: 2"),
        ("Phi-4-mini", {"num_attention_heads": 0}, "num_attention_heads: got 0; expected at least 1"),
        ("Phi-4-mini", {"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
        ("Phi-4-mini", {"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
        ("Phi-4-mini", {"rope_theta": 0}, "rope_theta: got 0; expected a number above 0"),
        ("Phi-4-mini", {"partial_rotary_factor": 0}, "partial_rotary_factor: got 0"),
        ("Phi-4-mini", {"rope_theta": float("nan")}, "rope_theta: got nan"),
        ("gemma-3-1b-it", {"rope_local_base_freq": -1}, "rope_local_base_freq: got -1"),
        ("gemma-3-1b-it", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor: got 0; expected a number"),
        ("Phi-4-mini", {"hidden_size": -1}, "hidden_size: got -1"),
        ("Phi-4-mini", {"sliding_window": 0}, "sliding_window: got 0"),
        ("gemma-3-1b-it", {"head_dim": 0}, "head_dim: got 0"),
        ("gemma-3-1b-it", {"sliding_window_pattern": 0}, "sliding_window_pattern: got 0"),
    ],
)
def test_a_feature_that_is_not_known_is_an_error_that_names_it(name, changes, named):
    config = {**RELEASED[name][0], **changes}
    with pytest.raises(UserError, match=named):
        family_of(config).read(config)


def test_the_context_decides_between_the_factors_of_longrope():
    arch = RELEASED["Phi-4-mini"][1]
    assert arch.for_context(4097) == arch
    assert arch.for_context(4096) == but(arch, rope_scaling=dataclasses.replace(LONGROPE, long_context=False))
    assert QWEN.for_context(10**6) == QWEN


def test_a_config_is_stretched_as_its_card_says_and_only_where_that_is_needed():
    config, arch = RELEASED["Qwen2.5-14B-Instruct"]
    assert stretched(config, 0) == stretched(config, 32_768) == config
    longer = stretched(config, 131_072)
    assert longer["rope_scaling"] == {"rope_type": "yarn", **{k: v for k, v in YARN_BLOCK.items() if k != "type"}}
    assert family_of(longer).read(longer) == family_of(config).read(config | {"rope_scaling": YARN_BLOCK})
    new = {k: v for k, v in config.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    assert family_of(new).read(stretched(new, 131_072)) == family_of(longer).read(longer)
    with pytest.raises(UserError, match="a rope_scaling already, for 131072 positions"):
        stretched(longer, 262_144)
    with pytest.raises(UserError, match="phi3 isn't stretched by YaRN"):
        stretched(RELEASED["Phi-3-mini-4k"][0], 131_072)


def test_an_arch_that_contradicts_itself_cannot_be_made():
    with pytest.raises(ValueError, match="local_layers"):
        but(QWEN, local_layers=(True,) * 48)
    with pytest.raises(ValueError, match="each of the 48 layers"):
        but(QWEN, window=8, local_layers=(True,))
