"""The machines that a run may be planned for: what a chip can do, and how chips are asked for by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pkv.config import UserError

TABLE = Path(__file__).with_name("chips.yaml")
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
CUBES = ("v4", "v5p", "tpu7x")  # whose grids have three axes
SLICED = 4
MOST_CHIPS = 65_536  # more are a slip, and would be described one by one
# Grids by the number in the names of Cloud TPU's types: of v5litepod-16 and v6e-8 chips, of v4-8 and v5p-8 two a chip.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}
_TYPE = re.compile(r"(?P<kind>v4|v5litepod|v5e|v5p|v6e)-(?P<number>[1-9]\d*)")
_FORM = re.compile(r"(?:(?P<slices>[1-9]\d*)x)??(?P<kind>[a-z][a-z0-9-]*):(?P<shape>\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Chip:
    """What one chip can do at most; see chips.yaml for the units. cores: devices that JAX has of it, each of which is
    planned as a chip of its own, and has its part of all here."""

    kind: str
    tflops: float
    tflops_32: float
    hbm_gib: float
    hbm_gbs: float
    link_gbs: float
    host_chips: int
    dcn_gbs: float
    dollars: float
    capability: float = 0.0
    cores: int = 1
    int8_weights: float = 1.0

    def products(self, dtype: str) -> float:
        """Operations a second at most, of numbers in `dtype`."""
        return 1e12 * (self.tflops_32 if dtype == "float32" else self.tflops)


@dataclass(frozen=True)
class Slice:
    """So many slices of chips in a grid, as in v5e:4x8, 2xv5p:4x4x4 or h100:8; the chips of a slice have links."""

    name: str
    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.grid) * self.chip.cores

    @property
    def host_chips(self) -> int:
        """Chips of one of its machines: a TPU slice that one machine doesn't hold is made of machines of four."""
        in_slice = self.chips // self.slices
        if in_slice <= self.chip.host_chips:
            return in_slice
        return SLICED * self.chip.cores if self.chip.kind in TPUS else self.chip.host_chips

    @property
    def machines(self) -> int:
        return -(-self.chips // self.host_chips)

    @property
    def compiles(self) -> bool:
        """Whether programs can be compiled for it here, with libtpu; for the others there is arithmetic only."""
        return self.chip.kind in TPUS

    @property
    def topology(self) -> str:
        """One slice as libtpu calls it."""
        return f"{self.chip.kind}:{'x'.join(map(str, self.grid))}"


def read_slice(name: str, prices: Path | None = None) -> Slice:
    """The slice called `name`. prices: a YAML file {kind: dollars a chip and hour}. Raises UserError."""
    table = read_table(TABLE)
    found = _FORM.fullmatch(name)
    if found is None or found["kind"] not in table:
        raise UserError(
            f"--topology {name}: expected a kind and a grid such as v5e:4x8, v5p:2x2x2, 2xv6e:4x4 or h100:8; kinds: "
            f"{', '.join(table)}{_meant(name, table)}"
        )
    kind, grid = found["kind"], tuple(map(int, found["shape"].split("x")))
    axes = (1,) if kind not in TPUS else (3,) if kind in CUBES else (2,)
    if 0 in grid:
        raise UserError(f"--topology {name}: expected at least one chip along each axis, as the grids of {kind} have")
    if len(grid) not in axes:
        raise UserError(
            f"--topology {name}: {kind} comes in grids of {axes[0]} axes, got {len(grid)}; such as "
            f"{kind}:{'x'.join('2' * axes[0])}"
        )
    numbers = dict(table[kind])
    if prices is not None:
        own = read_table(prices)
        for priced, dollars in own.items():
            if priced not in table:
                raise UserError(f"{prices}: {priced}: no chip of that name; kinds: {', '.join(table)}")
            if isinstance(dollars, bool) or not isinstance(dollars, int | float) or not 0 <= dollars < math.inf:
                raise UserError(f"{prices}: {priced}: expected dollars a chip and hour, got {dollars!r}")
        if kind in own:
            numbers["dollars"] = own[kind] / numbers.get("cores", 1)
    wanted = Slice(name, Chip(kind, **numbers), grid, int(found["slices"] or 1))
    if wanted.chips > MOST_CHIPS:
        raise UserError(f"--topology {name}: {wanted.chips} chips; expected at most {MOST_CHIPS}")
    if not wanted.compiles and wanted.chips // wanted.slices % wanted.host_chips:
        raise UserError(
            f"--topology {name}: a machine has {wanted.host_chips} of them at most; expected a multiple of that, or "
            f"machines of fewer as in 2x{kind}:{wanted.host_chips // 2}"
        )
    return wanted


def _meant(name: str, table: Mapping[str, Any]) -> str:
    """What somebody may mean who writes another case, or the type by which Cloud TPU rents a slice."""
    lower = name.lower()
    if (found := _FORM.fullmatch(lower)) is not None and found["kind"] in table:
        return f"; did you mean {lower}?"
    if (found := _TYPE.fullmatch(lower)) is not None:
        kind = found["kind"].replace("litepod", "e")
        grid = (DEEP if kind in CUBES else FLAT).get(int(found["number"]))
        return f"; {name} is {kind}:{grid}" if grid else ""
    return ""


def read_table(file: Path) -> dict[str, Any]:
    """A YAML file of entries by chip. Raises UserError."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected entries by chip, such as `v5e: 1.20`")
    return found
