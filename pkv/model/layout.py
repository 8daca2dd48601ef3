"""Which tensor of a checkpoint belongs to which weight: the one list that loading and saving share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import numpy as np

from pkv.model.arch import Arch
from pkv.model.families import Family, Place
from pkv.model.weights import param_axes, param_shapes


@dataclass(frozen=True)
class DiskTensor:
    """One weight on disk, or one layer of a stacked one: a tensor, or rows of one that several weights share.

    path: the weight, such as "layers.attention.q". axes, sizes: of this tensor, in our order, without "layers".
    """

    name: str
    path: str
    layer: int | None
    place: Place
    axes: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it stands in the file; of a fused tensor, its own rows."""
        return self.place.disk_shape(self.sizes)

    def view(self, whole: np.ndarray) -> np.ndarray:
        """The weight within its tensor, with our axes in our order; nothing is copied."""
        return self.place.from_disk(whole, self.axes, self.sizes)


@dataclass(frozen=True)
class WholeTensor:
    """One tensor of a file with the weights in it, in the order of their rows; most hold one."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[DiskTensor, ...]


def disk_tensors(arch: Arch, family: Family) -> dict[str, list[DiskTensor]]:
    """All weights of a checkpoint by path, as they lie on disk; a stacked weight has one tensor for each layer."""
    axes, shapes, places = by_path(param_axes(arch)), by_path(param_shapes(arch)), family.places(arch)
    if lost := set(axes) ^ set(places):
        raise ValueError(f"{family.model_type}: weights and places differ in {sorted(lost)}")
    found: dict[str, list[DiskTensor]] = {}
    for path, place in places.items():
        stacked = axes[path][0] == "layers"
        inner = axes[path][1:] if stacked else axes[path]
        sizes = dict(zip(inner, shapes[path].shape[stacked:], strict=True))
        found[path] = [
            DiskTensor(place.name.format(layer=layer), path, layer, place, inner, sizes)
            for layer in (range(arch.layers) if stacked else [None])
        ]
    return found


def whole_tensors(weights: dict[str, list[DiskTensor]]) -> list[WholeTensor]:
    """The tensors that the file has. Raises ValueError where weights overlap in one, or leave rows of it out."""
    groups: dict[str, list[DiskTensor]] = {}
    for part in chain.from_iterable(weights.values()):
        groups.setdefault(part.name, []).append(part)
    found = []
    for name, group in groups.items():
        parts = sorted(group, key=lambda part: part.place.first_row)
        ends = [part.place.first_row + part.shape[0] for part in parts]
        if [part.place.first_row for part in parts] != [0, *ends[:-1]]:
            raise ValueError(f"{name}: the rows of {', '.join(part.path for part in parts)} do not join")
        found.append(WholeTensor(name, (ends[-1], *parts[0].shape[1:]), tuple(parts)))
    return found


def by_path(tree: Any) -> dict[str, Any]:
    """A tree of nested dicts as one dict with dotted paths; tuples of axis names are leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
