"""Checkpoints in and out: save∘load is the identity to the bit, and what doesn't fit is an error that names it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pkv.config import MeshConfig, UserError
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import (
    Arch,
    init_params,
    load_params,
    param_axes,
    param_shapes,
    read_arch,
    read_config,
    save_params,
    unstack_layers,
)

ARCH = Arch(vocab_size=40, hidden=16, layers=2, heads=4, kv_heads=2, head_size=6, ffn=24, rope_theta=1e6, qkv_bias=True)
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_config(directory: Path, **changes) -> Path:
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def edit_tensors(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    save_params(init_params(ARCH, jax.random.key(0)), ARCH, directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_file_bytes", [10**9, 4000])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, tied, dtype, max_file_bytes):
    arch = Arch(**{**vars(ARCH), "tied_embeddings": tied})
    params = init_params(arch, jax.random.key(0), dtype)
    save_params(params, arch, tmp_path, dtype=dtype, max_file_bytes=max_file_bytes)
    assert read_arch(tmp_path) == arch
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_file_bytes == 4000)
    loaded = load_params(tmp_path, arch, dtype)
    equal(loaded, params)
    assert {weight.dtype for weight in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_unstacked_weights_save_as_the_stacked_ones_do(tmp_path, saved):
    save_params(unstack_layers(init_params(ARCH, jax.random.key(0)), ARCH), ARCH, tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_the_config_that_came_is_the_config_that_goes(tmp_path, saved):
    source = {**read_config(saved), "eos_token_id": [1, 2], "max_window_layers": 28}
    save_params(load_params(saved, ARCH), ARCH, tmp_path / "out", source, dtype=jnp.bfloat16)
    assert read_config(tmp_path / "out") == {**source, "torch_dtype": "bfloat16"}


def test_loading_into_shards_gives_the_same_numbers(saved):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = shardings(param_axes(ARCH), param_shapes(ARCH), mesh, TRAINING_RULES)
    loaded = load_params(saved, ARCH, shardings=placed)
    equal(loaded, load_params(saved, ARCH))
    gate = loaded["layers"]["ffn"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16 // 4, 24 // 2)}


def test_a_model_is_never_written_over_another(saved):
    with pytest.raises(UserError, match="there is a model here already"):
        save_params(init_params(ARCH, jax.random.key(1)), ARCH, saved)
    equal(load_params(saved, ARCH), init_params(ARCH, jax.random.key(0)))


def test_a_config_of_another_model_is_refused(tmp_path, saved):
    source = {**read_config(saved), "rope_theta": 5.0}
    with pytest.raises(UserError, match="another model"):
        save_params(load_params(saved, ARCH), ARCH, tmp_path / "out", source)
    with pytest.raises(UserError, match="qk_norm"):
        arch = Arch(**{**vars(ARCH), "qk_norm": True})
        save_params(init_params(arch, jax.random.key(0)), arch, tmp_path / "out")


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_params(saved, ARCH)


def test_a_tensor_without_a_place_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.layers.0.q_norm.weight": np.ones(3, np.float32)}))
    with pytest.raises(UserError, match=r"no place for the tensor model\.layers\.0\.q_norm\.weight"):
        load_params(saved, ARCH)


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": np.ones(17, np.float32)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(17,\); .* \(16,\)"):
        load_params(saved, ARCH)


def test_a_tied_table_may_be_there_twice(tmp_path):
    arch = Arch(**{**vars(ARCH), "tied_embeddings": True})
    params = init_params(arch, jax.random.key(0))
    save_params(params, arch, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    equal(load_params(tmp_path, arch), params)


def test_turns_that_older_checkpoints_saved_are_passed_over_whatever_their_dtype(saved):
    params = load_params(saved, ARCH)
    turns = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3) for layer in range(ARCH.layers)}
    edit_tensors(saved, lambda tensors: tensors.update(turns))
    equal(load_params(saved, ARCH), params)


def test_a_file_cut_short_and_a_missing_file_are_one_line(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_params(saved, ARCH)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_params(saved, ARCH)


def test_an_index_cannot_point_out_of_its_directory(saved):
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="files of this directory"):
        load_params(saved, ARCH)


def test_both_generations_of_configs_read_alike(tmp_path):
    old = read_arch(write_config(tmp_path, rope_theta=1e6, torch_dtype="bfloat16", rope_scaling=None))
    new = read_arch(
        write_config(
            tmp_path,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            layer_types=["full_attention"] * 2,
            dtype="bfloat16",
        )
    )
    assert old == new
    assert (old.rope_theta, old.head_size, old.qkv_bias, old.tied_embeddings) == (1e6, 6, True, False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' .* known: qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"use_sliding_window": "yes"}, "use_sliding_window: expected bool, got 'yes'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size: expected int, got 'many'"),
        ({"num_key_value_heads": 3}, "4 query heads .* 3 key-value heads"),
    ],
)
def test_a_feature_that_is_not_known_is_an_error_that_names_it(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        read_arch(write_config(tmp_path, **changes))


def test_a_place_that_is_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_arch(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_arch(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_arch(tmp_path)
