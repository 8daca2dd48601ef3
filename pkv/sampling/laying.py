"""How weights lie to be sampled from: over the mesh, in memory, in which dtype; and the programs that lay them so."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple
from typing import cast as cast_type

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkv.mesh import SAMPLING_RULES, shardings
from pkv.model import Arch, Params, cast, lay_by_output, param_shapes, tied_scores, unstack_layers, weight_axes
from pkv.model.kernels import LANES
from pkv.model.linear import Flat
from pkv.model.lora import INPUTS

# Models of at most so many layers run with their layers unrolled: no slicing of stacked weights and pages. On a GPU
# most models do: XLA copies what a scan slices for its products, so that each weight crosses memory three times.
UNROLL, UNROLL_ON_GPU = 8, 128
FLAT_ON = ("tpu",)  # where products read matrices of two axes without copying them first, and others not
UNROLLED_SHARE = 0.4  # of a GPU's memory that weights may take beside those that they are copied from
Form = Literal["stacked", "apart", "by output"]  # apart: layer by layer; by output: so, and as `ByOutput`


def form_of(arch: Arch, mesh: Mesh, dtype: Any, *, eight_bit: bool = False) -> Form:
    """How the weights of an architecture lie on a mesh; each form but the stacked one takes a copy of them.

    eight_bit: of the layers' matrices.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return "by output" if arch.layers <= UNROLL else "stacked"
    if device.platform == "tpu":
        return "apart" if arch.layers <= UNROLL else "stacked"
    apart = apart_on_gpu(arch, dtype, mesh.shape["tensor"], _memory(device), eight_bit=eight_bit)
    return "apart" if apart else "stacked"


def apart_on_gpu(arch: Arch, dtype: Any, tensor: int, memory: float, *, eight_bit: bool) -> bool:
    """Whether layers lie apart on `tensor` GPUs that share each row; memory: bytes that one of them has."""

    def size(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> float:
        in_8_bits = eight_bit and path[-1].key in INPUTS
        return math.prod(shape.shape) * (1 if in_8_bits else jnp.dtype(dtype).itemsize)

    bytes_ = sum(size(path, shape) for path, shape in jax.tree.leaves_with_path(param_shapes(arch)))
    return arch.layers <= UNROLL_ON_GPU and bytes_ / tensor <= UNROLLED_SHARE * memory


def _memory(device: Any) -> float:
    """Bytes that a device lets this process have; inf where nothing says so."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    except jax.errors.JaxRuntimeError:  # it is only described
        return math.inf


class Laying(NamedTuple):
    """What becomes of an array of weights: its dtype, its place, and how often each key-value head stands.

    place: with the order of the axes in memory, if it isn't the compiler's own choice. heads: their axis, None where an
    array has none. inputs, out, steps: of one that becomes `Flat` how many of its axes are inputs, its outputs' sizes,
    and in 8 bits the place of its steps.
    """

    dtype: Any
    place: Format
    heads: int | None
    repeats: int
    inputs: int = 0
    out: tuple[int, ...] = ()
    steps: NamedSharding | None = None

    @property
    def places(self) -> Any:
        """Of all that the array becomes, as it is put together."""
        return Flat(self.place, self.steps, self.out) if self.inputs else self.place


class Lay:
    """Arrays of weights in the layout of sampling: a program for each way and shape.

    arch: with its key-value heads `repeats` times. mesh: of all hosts; the weights lie alike on each. banks: in which
    weights by output have their heads. flat: the layers' matrices become `Flat`; eight_bit: in 8 bits.
    """

    def __init__(
        self, arch: Arch, repeats: int, dtype: Any, mesh: Mesh, form: Form, banks: int, *, flat: bool, eight_bit: bool
    ) -> None:
        self._arch, self._repeats, self._dtype, self._mesh = arch, repeats, dtype, mesh
        self._form, self._banks, self._flat, self._eight_bit = form, banks, flat or eight_bit, eight_bit
        self._ways: dict[Laying, Any] = {}
        self.unstack = jax.jit(self._unstack)
        self._apart = jax.jit(lambda array: tuple(array[number] for number in range(arch.layers)))

    def __call__(self, array: jax.Array, how: Laying) -> Any:
        return self._way(how)(array)

    def place(self, params: Params) -> Params:
        """Weights in the layout, dtype, form and key-value heads of sampling.

        Array by array: one program for all of them gathers everything before it lays down the first, and so holds the
        weights twice.
        """
        both = zip(jax.tree.leaves_with_path(params), self.ways(params), strict=True)
        laid = [self._placed(array, how, apart=path[0].key == "layers") for (path, array), how in both]
        placed = jax.tree.unflatten(jax.tree.structure(params), laid)
        if self._form == "stacked":
            return placed
        if self._form == "apart":
            layer = lambda n: jax.tree.map(lambda parts: parts[n], placed["layers"], is_leaf=_is_tuple)  # noqa: E731
            return {**placed, "layers": tuple(map(layer, range(self._arch.layers)))}
        embedding = placed.pop("embedding")  # which a program would copy
        return self.joined(self.unstack(placed), embedding)

    def _placed(self, array: jax.Array, how: Laying, apart: bool) -> Any:
        """An array as it is laid; of layers that lie apart, a tuple of them."""
        if self._form != "apart":
            return self(array, how)
        place = cast_type(NamedSharding, how.place.sharding)
        right = not how.inputs and array.dtype == how.dtype and array.sharding.is_equivalent_to(place, array.ndim)
        laid = array if right and how.repeats == 1 else self(array, how)
        return self._apart(laid) if apart else laid

    def joined(self, apart: Params, embedding: Any) -> Params:
        """What `unstack` gave, with the embeddings again."""
        scores = tied_scores(embedding) if self._arch.tied_embeddings and self._form == "by output" else {}
        return {**apart, "embedding": embedding, **scores}

    def _unstack(self, params: Params) -> Params:
        apart = unstack_layers(params, self._arch)
        return lay_by_output(apart, self._banks) if self._form == "by output" else apart

    def lower(self, array: jax.ShapeDtypeStruct, how: Laying) -> jax.stages.Lowered:
        """The program before it is compiled."""
        return self._way(how).lower(array)

    def lies_right(self, params: Params) -> bool:
        """Whether weights, of which shapes, dtypes and places suffice, can be sampled from where they are."""
        if self._form != "stacked" or self._repeats > 1 or self._eight_bit:
            return False

        def right(array: Any, shape: Any, place: Any) -> bool:
            return array.dtype == shape.dtype and array.sharding.is_equivalent_to(place, array.ndim)

        return jax.tree.all(jax.tree.map(right, params, self._shapes(params), self._placing(params)))

    def described(self, params: Params) -> Any:
        """Shapes, dtypes and places of what `place` gives of stacked weights."""

        def one(array: Any, how: Laying) -> Any:
            laid = jax.eval_shape(partial(_lay, how=how), array)
            place = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)  # noqa: E731
            return jax.tree.map(place, laid, how.places)

        return jax.tree.map(one, params, jax.tree.unflatten(jax.tree.structure(params), self.ways(params)))

    def _placing(self, params: Params) -> Any:
        """Where the arrays lie, if none becomes another one."""
        return shardings(weight_axes(params, self._arch), self._shapes(params), self._mesh, SAMPLING_RULES)

    def ways(self, params: Params) -> list[Laying]:
        """What becomes of every array; shapes and dtypes suffice."""
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        axes = jax.tree.leaves(weight_axes(params, self._arch), is_leaf=_is_axes)
        both = zip(jax.tree.leaves(self._shapes(params)), jax.tree.leaves(self._placing(params)), strict=True)
        return [
            self._way_of(path, _heads(names), laid, place)
            for path, names, (laid, place) in zip(paths, axes, both, strict=True)
        ]

    def _way_of(self, path: tuple[Any, ...], heads: int | None, laid: Any, place: NamedSharding) -> Laying:
        """laid, place: of the array, if it stays one. Of axes that become one only the first may be spread."""
        of = path[-2] if getattr(path[-1], "name", "") == "base" else path[-1]  # of a matrix that has an adapter
        inputs = INPUTS.get(getattr(of, "key", ""), 0) if self._flat else 0
        if not inputs:
            return Laying(laid.dtype, _in_memory(laid.shape, place), heads, self._repeats)
        (L, *sizes), spec = laid.shape, (*place.spec, *(None,) * laid.ndim)
        out, (of_layers, of_in, of_out) = tuple(sizes[inputs:]), (spec[0], spec[1], spec[1 + inputs])
        at = lambda *parts: NamedSharding(self._mesh, PartitionSpec(*parts))  # noqa: E731
        table = _in_memory((L, math.prod(sizes[:inputs]), math.prod(out)), at(of_layers, of_in, of_out))
        if self._eight_bit:
            return Laying(jnp.dtype(jnp.int8), table, heads, self._repeats, inputs, out, at(of_layers, of_out))
        return Laying(laid.dtype, table, heads, self._repeats, inputs, out)

    def _shapes(self, params: Params) -> Any:
        """Shapes and dtypes of the arrays, if none becomes another one."""

        def repeated(names: tuple[str, ...], array: jax.Array) -> jax.Array:
            return _repeated(array, _heads(names), self._repeats)

        axes = weight_axes(params, self._arch)
        laid = lambda params: jax.tree.map(repeated, axes, cast(params, self._dtype), is_leaf=_is_axes)  # noqa: E731
        return jax.eval_shape(laid, params)

    def _way(self, how: Laying) -> Any:
        if how not in self._ways:
            self._ways[how] = jax.jit(partial(_lay, how=how), out_shardings=how.places)
        return self._ways[how]

    def _cache_size(self) -> int:
        programs: list[Any] = [*self._ways.values(), self.unstack, self._apart]
        return sum(program._cache_size() for program in programs)


def _lay(array: jax.Array, how: Laying) -> Any:
    repeated = _repeated(array, how.heads, how.repeats)
    if not how.inputs:
        return repeated.astype(how.dtype)
    return Flat.of(repeated, how.inputs, how.dtype, eight_bit=how.steps is not None)


def _repeated(array: jax.Array, heads: int | None, repeats: int) -> jax.Array:
    return array if heads is None or repeats == 1 else jnp.repeat(array, repeats, heads)


def _heads(names: tuple[str, ...]) -> int | None:
    return names.index("kv_heads") if "kv_heads" in names else None


def _in_memory(shape: tuple[int, ...], place: NamedSharding) -> Format:
    """Row by row where a device's rows don't fill whole registers: to save the padding XLA would turn such an array on
    TPU, and every segment would copy it back."""
    ragged = len(shape) > 1 and place.shard_shape(shape)[-1] % LANES
    return Format(Layout(tuple(range(len(shape)))) if ragged else None, place)


def _is_tuple(node: Any) -> bool:
    return isinstance(node, tuple)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
