"""The mesh: sizes that fit or an error with the numbers, one sharding for every array, keys that know their purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pkv.config import MeshConfig, UserError
from pkv.mesh import (
    SAMPLING_RULES,
    TRAINING_RULES,
    batch_sharding,
    fold,
    gathered,
    make_mesh,
    replicated,
    scattered,
    shardings,
)


def spec_of(axes, shape, mesh, rules=TRAINING_RULES):
    return shardings({"w": axes}, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh, rules)["w"].spec


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 1, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
    ],
)
def test_minus_one_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3), "data=3 × fsdp=1 × sequence=1 × tensor=1 = 3 .* 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "fsdp=3 .* 8 devices"),
        (MeshConfig(data=-1, fsdp=16), "fsdp=16 .* 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "data and fsdp"),
        (MeshConfig(data=0), "data=0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_with_the_numbers(config, words):
    with pytest.raises(UserError, match=words):
        make_mesh(config)


def test_weights_are_spread_by_the_rules():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    axes, shape = ("layers", "embed", "heads", "head"), (2, 8, 4, 6)
    assert spec_of(axes, shape, mesh) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert spec_of(axes, shape, mesh, SAMPLING_RULES) == PartitionSpec(None, None, ("tensor",), None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    assert spec_of(axes, shape, mesh) == PartitionSpec(None, ("fsdp", "sequence"), ("tensor",), None)


def test_on_one_device_nothing_is_spread():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert spec_of(("embed", "heads", "head"), (7, 3, 5), mesh) == PartitionSpec(None, None, None)


def test_a_size_that_the_mesh_does_not_divide_is_an_error_with_the_numbers():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"w: heads=3 of shape \(8, 3, 6\) is not divisible by 2 \(tensor=2\)"):
        spec_of(("embed", "heads", "head"), (8, 3, 6), mesh)


def test_key_value_heads_that_the_mesh_does_not_divide_stay_whole():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert spec_of(("embed", "kv_heads", "head"), (8, 3, 6), mesh) == PartitionSpec(("fsdp",), None, None)
    assert spec_of(("embed", "kv_heads", "head"), (8, 4, 6), mesh) == PartitionSpec(("fsdp",), ("tensor",), None)


def test_two_axes_of_an_array_on_one_mesh_axis_are_an_error():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"'heads' and 'ffn' .* mesh axis 'tensor'"):
        spec_of(("heads", "ffn"), (8, 8), mesh)


def test_an_axis_without_a_rule_and_a_missing_axis_are_errors():
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="no rule for the logical axis 'experts'"):
        spec_of(("experts",), (8,), mesh)
    with pytest.raises(UserError, match="1 logical axes"):
        spec_of(("embed",), (8, 8), mesh)


def test_rows_are_spread_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.device_put(np.arange(8.0).reshape(4, 2), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 2)}
    whole = jax.device_put(np.arange(8.0), replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8,)}


@pytest.mark.parametrize("hint", [gathered, scattered])
def test_the_hint_on_rows_holds_inside_a_mesh_and_is_nothing_without_one(hint):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(hint(x), x)
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda x: hint(x * 1))(x)
        odd = jax.jit(lambda x: hint(x * 1))(x[:3])
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 2)}
    np.testing.assert_array_equal(spread, x)
    np.testing.assert_array_equal(odd, x[:3])


def test_between_layers_positions_are_spread_over_tensor_and_gradients_the_other_way():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    x = jnp.arange(2.0 * 8 * 3).reshape(2, 8, 3)
    whole, parts = (1, 4, 3), (1, 2, 3)  # a row's positions over sequence, and over tensor too
    for hint, forward, backward in ((gathered, whole, parts), (scattered, parts, whole)):
        with jax.set_mesh(mesh):
            value, pull = jax.jit(lambda x, hint=hint: jax.vjp(hint, x))(x)
            gradient = jax.jit(lambda pull, g: pull(g)[0])(pull, 2 * x)
        assert {shard.data.shape for shard in value.addressable_shards} == {forward}
        assert {shard.data.shape for shard in gradient.addressable_shards} == {backward}
        np.testing.assert_array_equal(value, x)
        np.testing.assert_array_equal(gradient, 2 * x)
        with jax.set_mesh(mesh):  # positions that tensor doesn't divide are left to sequence
            odd = jax.jit(lambda x, hint=hint: hint(x * 1))(x[:, :2])
        assert {shard.data.shape for shard in odd.addressable_shards} == {(1, 1, 3)}


def test_slices_hold_whole_copies_and_data_goes_over_them():
    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        process_index: int = 0
        platform: str = "cpu"
        device_kind: str = "cpu"

    chips = [Chip(number, number // 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), chips)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    for place in range(2):
        assert {chip.slice_index for chip in mesh.devices[place].flat} == {place}
    with pytest.raises(UserError, match=r"mesh\.data: 1 is not divisible by 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), chips)


def test_a_key_depends_on_every_part_of_its_purpose():
    root = jax.random.key(0)
    purposes = [("a", 1), ("b", 1), ("a", 2), (1, "a"), ("a",), ("a", 1, 0)]
    data = {tuple(jax.random.key_data(fold(root, *parts)).tolist()) for parts in purposes}
    assert len(data) == len(purposes)


def test_a_key_is_the_same_on_every_machine_and_when_traced():
    root = jax.random.key(0)
    assert jax.random.key_data(fold(root, "rollout", 3)).tolist() == [4206679575, 3769683249]
    traced = jax.jit(lambda step: fold(root, "rollout", step))(jnp.int32(3))
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(fold(root, "rollout", 3)))
