"""What a family of checkpoints is: how its config reads, how its tensors are named and laid out. No numbers here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from pkv.config import UserError
from pkv.model.arch import Arch


@dataclass(frozen=True)
class Place:
    """Where one weight lies in a checkpoint.

    name: the tensor's name, with {layer} in it where there is one for each layer.
    layout: its dimensions in our logical axes; "(heads head) embed" is a matrix whose rows are heads and then head.
    first_row: where this weight's rows begin in a fused tensor, which several places name.
    """

    name: str
    layout: str
    first_row: int = 0

    def disk_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The weight's shape in the file, from the sizes of our axes; in a fused tensor, that of its own rows."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self._groups())

    def from_disk(self, array: np.ndarray, axes: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """A tensor of the file with our axes in our order; a view, nothing is copied."""
        order = [axis for group in self._groups() for axis in group]
        rows = array[self.first_row : self.first_row + self.disk_shape(sizes)[0]]
        return rows.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in axes])

    def to_disk(self, array: jax.Array, axes: Sequence[str], sizes: Mapping[str, int]) -> jax.Array:
        """Our array as the file has it; the inverse of `from_disk`, but for the other rows of a fused tensor."""
        order = [axis for group in self._groups() for axis in group]
        return array.transpose([list(axes).index(axis) for axis in order]).reshape(self.disk_shape(sizes))

    def _groups(self) -> list[list[str]]:
        """The logical axes inside each dimension on disk."""
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", self.layout)]


@dataclass(frozen=True)
class Family:
    """One family: `read` turns a config into an Arch, `words` turns it back, `places` maps our paths to tensors.

    words: a config that says of an Arch what the family has words for; use `write`, which sees that it says all.
    redundant: tensors that a checkpoint may hold and that say nothing new (a copy of a tied table); any dtype.
    rename: a tensor's name in a larger model as the family has it; None for one that is not of its text.
    """

    model_type: str
    read: Callable[[dict[str, Any]], Arch]
    words: Callable[[Arch], dict[str, Any]]
    places: Callable[[Arch], dict[str, Place]]
    redundant: Callable[[Arch], frozenset[str]]
    rename: Callable[[str], str | None] = lambda name: name

    def write(self, arch: Arch) -> dict[str, Any]:
        """The config that reads back as `arch`. Raises UserError naming a feature that this family has no words for."""
        config = {"model_type": self.model_type, **self.words(arch)}
        read = self.read(config)
        for field in fields(Arch):
            if (value := getattr(arch, field.name)) != (other := getattr(read, field.name)):
                raise UserError(
                    f"a {self.model_type} checkpoint has no words for {field.name}={value!r}, only for {other!r}; "
                    "export it as the family that it came from"
                )
        return config
