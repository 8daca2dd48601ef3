"""Devices as a mesh, and the one place where logical axis names become mesh axes. No weights and no model here.

The same code runs on one CPU device, on eight fake ones and on a pod. Randomness that is keyed by its purpose lives
here too, because mesh shapes and scheduling must never change what is drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pkv.config import MeshConfig, UserError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are spread over both,
TIME_AXIS = "sequence"  # and their positions over this one
TOKEN_AXES = (*BATCH_AXES, TIME_AXIS)
STREAM_AXES = (TIME_AXIS, "tensor")
HEAD_AXES = ("tensor", TIME_AXIS)  # where attention meets whole rows, each device has some heads of them
PAGE_AXES = (*BATCH_AXES, "sequence")  # the KV pages of a row lie on the row's devices, in turn over sequence

Rules = Mapping[str, str | tuple[str, ...] | None]

# Training spreads every large weight over all axes but data; a chip holds 1/(fsdp·sequence·tensor) of the state.
TRAINING_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", TIME_AXIS),
    "heads": "tensor",
    "kv_heads": "tensor",
    "row_heads": HEAD_AXES,
    "head": None,
    "ffn": "tensor",
    "rank": None,
    "block": None,  # numbers that share a scale
    "rows": BATCH_AXES,
    "time": None,
    "pages": PAGE_AXES,
}
# Decoding reads every weight for every token: gathering them over fsdp at each step costs more than holding a copy.
SAMPLING_RULES: Rules = {**TRAINING_RULES, "embed": None}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor; one size may be -1: what is left. Raises UserError.

    Of several slices, which only a data centre's network joins, each has whole copies of what is sharded: the data axis
    goes over them first, and all others stay within one. A host's devices are next to each other.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    wrong = [f"{name}={size}" for name, size in sizes.items() if size != -1 and size < 1]
    if wrong:
        raise UserError(f"mesh: got {', '.join(wrong)}; expected -1 (what is left) or a size of at least 1")
    if len(free) > 1:
        raise UserError(f"mesh: {' and '.join(free)} are both -1; only one axis can take what is left")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // taken
    asked = math.prod(sizes.values())
    if asked != len(devices):
        text = " × ".join(f"{name}={size}" for name, size in sizes.items() if name not in free)
        raise UserError(
            f"mesh: {text} = {taken} does not fit on {len(devices)} devices; choose sizes that multiply to it, which "
            "pkv plan --search does by itself"
        )
    places = _arrange(tuple(sizes.values()), devices, ("slice_index", "process_index"))
    return Mesh(places, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any], parts: tuple[str, ...]) -> np.ndarray:
    """Devices as an array of the mesh's sizes: slices apart along data, and hosts along data and fsdp.

    So a host's devices are a block of the mesh with whole sequence and tensor axes, wherever that is possible: it
    samples by itself. parts: by which attributes devices are still to be told apart.
    """
    if not parts:  # by jax.make_mesh, which knows where an axis of chips may be split
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices).devices
    by_part: dict[int, list[Any]] = {}
    for device in devices:
        by_part.setdefault(getattr(device, parts[0], 0), []).append(device)
    count, (data, fsdp, *inner) = len(by_part), sizes
    over_data = math.gcd(count, data)
    over_fsdp = count // over_data
    if parts[0] == "slice_index" and over_fsdp > 1:
        raise UserError(
            f"mesh.data: {data} is not divisible by {count} slices; give it a multiple, or -1, since the "
            "other axes stay within a slice"
        )
    if fsdp % over_fsdp or len({len(part) for part in by_part.values()}) > 1:
        return _arrange(sizes, devices, parts[1:])
    inside = (data // over_data, fsdp // over_fsdp, *inner)
    # All as the first one is: collectives over several need chips at the same place in each.
    sorted_parts = [sorted(part, key=_place) for _, part in sorted(by_part.items())]
    order = {device: number for number, device in enumerate(sorted_parts[0])}
    first = np.vectorize(order.__getitem__, otypes=[int])(_arrange(inside, sorted_parts[0], parts[1:]))
    grid = np.array(sorted_parts, object)[:, first].reshape(over_data, over_fsdp, *inside)
    return np.moveaxis(grid, 1, 2).reshape(sizes)


def _place(device: Any) -> tuple[Any, ...]:
    """Where a chip is in its slice, from the last axis of the torus on; other devices in the order of their numbers."""
    return *reversed(getattr(device, "coords", ())), device.id


def own_part(mesh: Mesh) -> Mesh:
    """The mesh of this host's own devices, on which it samples. Raises UserError where a row needs those of several."""
    if jax.process_count() == 1:
        return mesh
    mine = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    block = mesh.devices[np.ix_(*(np.unique(places) for places in np.nonzero(mine)))]
    if block.size != mine.sum() or block.shape[2:] != mesh.devices.shape[2:]:
        ways = mesh.shape[TIME_AXIS] * mesh.shape["tensor"]
        raise UserError(
            f"mesh: sequence × tensor = {ways} need devices of several hosts, and a host of {mine.sum()} samples by "
            "itself; make them a divisor of that"
        )
    return Mesh(block, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_own_part(array: jax.Array, own: Mesh) -> jax.Array:
    """What `own_part` holds of an array that lies alike on every host: the same memory, seen as an array there."""
    if not isinstance(array.sharding, NamedSharding):
        raise TypeError(f"an array on a mesh is expected, got one on {array.sharding}")
    place = NamedSharding(own, array.sharding.spec)
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, place, shards)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How an array [B, T, ...] of a batch lies on the mesh: rows over data and fsdp, positions over sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, TIME_AXIS))


def gathered(x: jax.Array) -> jax.Array:
    """Inside `jax.set_mesh`: the compiler keeps [B, T, ...] as `batch_sharding` has it, and the other axes whole.

    Without this hint it may follow the weights instead and spread an activation's last axis over fsdp. It is a hint:
    without a mesh, where x is one device's own rows, or with rows that the devices don't divide, x comes back as it is.
    The gradient lies as `scattered` has it.
    """
    return _gathered(x)


def scattered(x: jax.Array) -> jax.Array:
    """The same for what stands between layers, whose positions are spread over tensor too.

    So a chip keeps 1/tensor of what the backward pass needs of every layer, and norms nothing twice. What is summed
    over tensor comes scattered, and is `gathered` before the next product: as many bytes as a sum that all chips get
    (arXiv 2205.05198, section 4.2.2). The gradient goes the other way, which the compiler doesn't find by itself.
    """
    return _scattered(x)


def _turned(forward: tuple[str, ...], backward: tuple[str, ...]) -> Callable[[jax.Array], jax.Array]:
    """Positions spread over some axes, those of the gradient over others."""
    turned = jax.custom_vjp(lambda x: _constrained(x, forward))
    turned.defvjp(lambda x: (_constrained(x, forward), None), lambda _, g: (_constrained(g, backward),))
    return turned


def _constrained(x: jax.Array, positions: tuple[str, ...]) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    own = set(BATCH_AXES) & set(mesh.manual_axes)
    if own or not set(AXES) <= set(mesh.axis_names) or x.shape[0] % _ways(mesh, BATCH_AXES):
        return x
    while positions and x.shape[1] % _ways(mesh, positions):
        positions = positions[:-1]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, positions or None))


_scattered = _turned(STREAM_AXES, (TIME_AXIS,))
_gathered = _turned((TIME_AXIS,), STREAM_AXES)


def summed_apart(weight: jax.Array) -> jax.Array:
    """The same array, whose gradient is summed over devices before it is put with those of other layers.

    In a loop over layers XLA takes it for something that only the loop's end needs, moves the sum over data behind the
    loop, and makes the gradients of all layers whole for it.
    """
    return _summed_apart(weight) if jnp.issubdtype(weight.dtype, jnp.inexact) else weight


_summed_apart = jax.custom_vjp(lambda weight: weight)
_summed_apart.defvjp(lambda weight: (weight, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def by_heads(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inside `jax.set_mesh`: from some positions of all heads on a device to all positions of some heads.

    So attention sees whole rows where positions are spread over sequence, and every device has the same work whatever
    the mask (DeepSpeed-Ulysses, arXiv 2309.14509). Key-value heads that are fewer than the devices are repeated until
    each device has its own. With one device along sequence and tensor, or heads that they don't divide, the arrays come
    back as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or set(TOKEN_AXES) & set(mesh.manual_axes):
        return q_BTNH, k_BTKH, v_BTKH
    ways, (N, K) = _ways(mesh, HEAD_AXES), (q_BTNH.shape[2], k_BTKH.shape[2])
    if ways == 1 or N % ways:
        return q_BTNH, k_BTKH, v_BTKH
    repeats = math.lcm(K, ways) // K
    rows = BATCH_AXES if q_BTNH.shape[0] % _ways(mesh, BATCH_AXES) == 0 else None
    place = PartitionSpec(rows, None, HEAD_AXES)
    heads = (q_BTNH, *(jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_BTKH, v_BTKH)))
    q_BTNH, k_BTKH, v_BTKH = (jax.lax.with_sharding_constraint(x, place) for x in heads)
    return q_BTNH, k_BTKH, v_BTKH


def over_tokens(function: Callable[..., Any], weights_axes: Any) -> Callable[..., Any]:
    """A function `(weights, *arrays)` that every device calls on its own tokens of the arrays [B, T, ...].

    Its results are [B, T] alike. The weights, of the logical axes `weights_axes`, come whole but for the vocabulary,
    which is spread over tensor: of its columns the function has its own, and adds up over `vocabulary_axis`. What is a
    sum over devices in the gradients is added up once, after the function. Inside `jax.set_mesh`; without a mesh, or
    with tokens that the devices don't divide, it is the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return function
    rules = {**dict.fromkeys(TRAINING_RULES), "vocab": TRAINING_RULES["vocab"]}

    def sharded(weights: Any, *arrays: jax.Array) -> Any:
        B, T = arrays[0].shape[:2]
        if B % _ways(mesh, BATCH_AXES) or T % mesh.shape[TIME_AXIS]:
            return function(weights, *arrays)
        tokens = PartitionSpec(BATCH_AXES, TIME_AXIS)

        def apart(array: jax.Array, spec: PartitionSpec) -> jax.Array:
            """Each device's own copy: within a loop of the function, a shared one's gradient is added up every turn."""
            spread = {name for names in spec if names for name in ((names,) if isinstance(names, str) else names)}
            return jax.lax.pcast(array, tuple(name for name in AXES if name not in spread), to="varying")

        spec = lambda axes, table: _spec("weights", axes, table.shape, mesh, rules)  # noqa: E731
        specs = jax.tree.map(spec, weights_axes, weights, is_leaf=_is_axes), *(tokens for _ in arrays)
        own = lambda *given: function(*jax.tree.map(apart, given, specs))  # noqa: E731
        return jax.shard_map(own, in_specs=specs, out_specs=tokens)(weights, *arrays)

    return sharded


def vocabulary_axis() -> str | None:
    """The mesh axis over which devices have columns of the same table, where each sees its own only; None elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return "tensor" if "tensor" in mesh.manual_axes else None


def merging_axis() -> str | None:
    """The mesh axis over which devices hold parts of the same rows, where each sees its own only; None elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return "sequence" if "sequence" in mesh.manual_axes and mesh.shape["sequence"] > 1 else None


def _ways(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Over how many devices the mesh axes spread."""
    return math.prod(mesh.shape[name] for name in axes)


def over_shards(function: Callable[..., jax.Array], axes: Sequence[tuple[str, ...]]) -> Callable[..., jax.Array]:
    """A function that every device calls on its own shards of its arrays, by TRAINING_RULES for their logical axes.

    Its result is sharded like the first array. Inside `jax.set_mesh`; without a mesh it is the function itself. Rows
    that the devices don't divide are left whole. Raises UserError for another axis that they don't divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return function

    def sharded(*arrays: jax.Array) -> jax.Array:
        rows_divide = arrays[0].shape[0] % _ways(mesh, BATCH_AXES) == 0
        rules = TRAINING_RULES if rows_divide else {**TRAINING_RULES, "rows": None}
        specs = tuple(_spec("attention", a, x.shape, mesh, rules) for a, x in zip(axes, arrays, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return sharded


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(axes_tree: Any, shapes_tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A tree of NamedSharding for a tree of logical axes.

    axes_tree: tuples of logical axis names, one name for each dimension. shapes_tree: the same structure with anything
    that has a `.shape`. Key-value heads that the mesh axes don't divide are left whole: they are small, and few. Raises
    UserError for an unknown axis name, for two dimensions of one array on the same mesh axis, and for any other size
    that the mesh axes don't divide.
    """

    def one(path: tuple[Any, ...], axes: tuple[str, ...], array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, _spec(name, axes, array.shape, mesh, rules, left_whole=("kv_heads",)))

    return jax.tree_util.tree_map_with_path(one, axes_tree, shapes_tree, is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def _spec(
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    left_whole: tuple[str, ...] = (),
) -> PartitionSpec:
    """left_whole: axes that stay whole where the mesh axes don't divide them."""
    if len(axes) != len(shape):
        raise UserError(f"{name}: {len(axes)} logical axes {axes} for the {len(shape)} dimensions of shape {shape}")
    owner: dict[str, str] = {}
    parts: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise UserError(f"{name}: no rule for the logical axis {axis!r}; known: {', '.join(rules)}")
        rule = rules[axis]
        places = () if rule is None else (rule,) if isinstance(rule, str) else rule
        places = tuple(place for place in places if mesh.shape[place] > 1)  # an axis of one device shards nothing
        for place in places:
            if place in owner:
                raise UserError(
                    f"{name}: the axes {owner[place]!r} and {axis!r} of {axes} both go to the mesh axis {place!r}"
                )
            owner[place] = axis
        ways = math.prod(mesh.shape[place] for place in places)
        if size % ways and axis in left_whole:
            places = ()
        elif size % ways:
            text = " × ".join(f"{place}={mesh.shape[place]}" for place in places)
            raise UserError(
                f"{name}: {axis}={size} of shape {shape} is not divisible by {ways} ({text}); change the mesh"
            )
        parts.append(places or None)
    return PartitionSpec(*parts)


def fold(key: jax.Array, *parts: int | str | jax.Array) -> jax.Array:
    """A key for one purpose: `fold(root, "rollout", step, problem, sample)`.

    Each part is folded in turn: whole numbers (traced ones too) as they are, text by its CRC-32, which is the same on
    every machine and in every process.
    """
    for part in parts:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return key
