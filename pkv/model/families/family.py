"""What a family of checkpoints is: how its config reads, how its tensors are named and laid out. No numbers here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pkv.config import UserError, describe
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
    """One family: `read` turns a config into an Arch, `write` turns it back, `places` maps our paths to tensors.

    redundant: tensors that a checkpoint may hold and that say nothing new (a copy of a tied table).
    """

    model_type: str
    read: Callable[[dict[str, Any]], Arch]
    write: Callable[[Arch], dict[str, Any]]
    places: Callable[[Arch], dict[str, Place]]
    redundant: Callable[[Arch], frozenset[str]]


class ConfigReader:
    """Reads a Hugging Face config so that no key goes by unread: `finish` raises UserError for what nobody took."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._taken: set[str] = set()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a key; without a default it must be there. Whole numbers pass as float. Raises UserError."""
        self._taken.add(name)
        value = self._config.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"config.json: {name} is missing; the checkpoint is not complete")
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise UserError(f"config.json: {name}: expected {kind.__name__}, got {describe(value)}")
        return value

    def only(self, name: str, *known: Any) -> None:
        """A feature of which only these values are supported (or none given). Raises UserError for another."""
        self._taken.add(name)
        value = self._config.get(name)
        if value is not None and value not in known:
            words = " or ".join(repr(one) for one in known)
            raise UserError(f"config.json: {name}: {describe(value)} is not supported; known: {words}")

    def skip(self, *names: str) -> None:
        """Keys that say nothing about the computation."""
        self._taken.update(names)

    def rope_theta(self, default: float) -> float:
        """The rotary base, from either generation of configs; any scaling of positions is an error by name."""
        self.only("rope_scaling", {"rope_type": "default"}, {"type": "default"})
        self._taken.add("rope_parameters")
        rope = dict(self._config.get("rope_parameters") or {})
        if (kind := rope.pop("rope_type", rope.pop("type", "default"))) != "default":
            raise UserError(f"config.json: rope_parameters: rope_type {kind!r} is not supported; known: 'default'")
        theta = rope.pop("rope_theta", None)
        if rope:
            raise UserError(f"config.json: rope_parameters: unknown feature {', '.join(map(repr, rope))}")
        if theta is None:
            return self.take("rope_theta", float, default)
        self._taken.add("rope_theta")
        return float(theta)

    def finish(self) -> None:
        """Raises UserError naming a key that nobody took; null, false and 0 switch nothing on."""
        left = [name for name, value in self._config.items() if name not in self._taken and value not in (None, False)]
        if left:
            raise UserError(
                f"config.json: unknown feature {left[0]} = {describe(self._config[left[0]])}; "
                "pkv would compute something else than the checkpoint was trained for"
            )


# Facts about files, tokens and generation: nothing of the decoder's computation.
METADATA = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
