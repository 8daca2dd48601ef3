"""Which tensor of a checkpoint belongs to which weight: the one list that loading and saving share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from pkv.model.arch import Arch
from pkv.model.families import Family, Place
from pkv.model.weights import param_axes, param_shapes

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class DiskTensor:
    """One tensor on disk: a whole weight, or one layer of a stacked one.

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
        """As it stands in the file."""
        return self.place.disk_shape(self.sizes)


def disk_tensors(arch: Arch, family: Family) -> dict[str, list[DiskTensor]]:
    """All tensors of a checkpoint by our weight's path; a stacked weight has one for each layer, in order."""
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


def by_path(tree: Any) -> dict[str, Any]:
    """A tree of nested dicts as one dict with dotted paths; tuples of axis names are leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
