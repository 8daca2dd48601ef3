"""How fast each pair of a head's dimensions turns with the position, plain and scaled to longer contexts.

Numbers of numpy only, rounded to 32 bits where transformers rounds them: at position 100,000 the last bit of a
frequency is some thousandths of a radian. Each scaling's `turns` takes the plain periods, 1 / (radians a position), and
gives its own radians a position. The turning itself is in `decoder.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Linear:
    """Positions divided by a factor (arXiv 2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def turns(self, periods: np.ndarray, theta: float) -> np.ndarray:
        return 1 / periods / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3:
    """Slow pairs divided by a factor, fast ones left alone, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    attention_factor: float = 1.0

    def turns(self, periods: np.ndarray, theta: float) -> np.ndarray:
        plain = 1 / periods
        waves = np.float32(self.original_positions) / (np.float32(2 * math.pi) / plain)  # in the original window
        share = (waves - np.float32(self.low_freq_factor)) / np.float32(self.high_freq_factor - self.low_freq_factor)
        between = (1 - share) * plain / np.float32(self.factor) + share * plain
        slow, fast = waves < self.low_freq_factor, waves > self.high_freq_factor
        return np.where(slow, plain / np.float32(self.factor), np.where(fast, plain, between))


@dataclass(frozen=True)
class Yarn:
    """Slow pairs divided by a factor, fast ones left alone, a ramp over the pairs between (arXiv 2309.00071)."""

    factor: float
    original_positions: int
    attention_factor: float  # cos and sin are multiplied by it
    beta_fast: float = 32.0  # a pair with more waves than this in the original window is left alone
    beta_slow: float = 1.0  # one with fewer than this is divided
    truncate: bool = True  # the ramp begins and ends at whole pairs

    def turns(self, periods: np.ndarray, theta: float) -> np.ndarray:
        size = 2 * len(periods)

        def pair(waves: float) -> float:
            return size * math.log(self.original_positions / (waves * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        last += 0.001 if first == last else 0
        ramp = np.clip((np.arange(len(periods), dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
        kept = 1 - ramp
        return 1 / (np.float32(self.factor) * periods) * (1 - kept) + 1 / periods * kept


@dataclass(frozen=True)
class LongRope:
    """Every pair divided by its own factor, from a list for the original window and one for what is longer
    (arXiv 2402.13753).

    long_context: which of the two. transformers decides in each call, by the longest row of the batch, and so gives a
    row other numbers for its batch-mates, and for what it will say later. Here a run decides it once, by
    grpo.row_tokens, and a command by the longest row that it may write.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int
    attention_factor: float
    long_context: bool

    def turns(self, periods: np.ndarray, theta: float) -> np.ndarray:
        factors = self.long_factors if self.long_context else self.short_factors
        return 1 / (np.asarray(factors, np.float32) * periods)


Scaling = Linear | Llama3 | Yarn | LongRope


def turns(theta: float, size: int, scaling: Scaling | None = None) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of the `size` dimensions that turn, float32 [size/2]; what cos and sin are
    multiplied by (arXiv 2104.09864, section 3.2.2)."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    periods = np.power(theta, exponents, dtype=np.float64).astype(np.float32)
    if scaling is None:
        return 1 / periods, 1.0
    return scaling.turns(periods, theta).astype(np.float32), scaling.attention_factor
