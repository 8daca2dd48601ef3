"""From a gradient to a step for every weight: AdamW, or Muon for the matrices between and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pkv.config import OptimizerConfig, RoundConfig
from pkv.grpo.moments import scale_by_adam
from pkv.model import Arch, param_axes


def make_optimizer(config: OptimizerConfig, arch: Arch) -> optax.GradientTransformation:
    """Steps to be added, times a learning rate, to the weights; norms and biases never decay.

    "muon" (arXiv 2502.16982) steps along the orthogonalised momentum of each matrix of a layer, as long as an AdamW
    step of the same learning rate (their section 2.2); embeddings, norms and biases are AdamW's.
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adamw":
        adamw = (
            scale_by_adam(config.b1, config.b2, config.moments),
            optax.add_decayed_weights(config.weight_decay, mask=_decayed),
            optax.scale(-1.0),
        )
        return optax.chain(clip, *adamw)
    return optax.chain(
        clip,
        muon(
            learning_rate=1.0,
            beta=config.momentum,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=jax.tree.map(_sides, param_axes(arch), is_leaf=_is_axes),
        ),
        optax.add_decayed_weights(-config.weight_decay, mask=_decayed),  # optax masks muon's own weights only
    )


def learning_rate(round_: RoundConfig, step: int) -> float:
    """What a round's step, counted from 0, learns with: linear up over `ramp_steps`, then by its schedule down."""
    peak, last, ramp = round_.learning_rate, round_.final_learning_rate, round_.ramp_steps
    if step < ramp:
        return peak * (step + 1) / ramp
    steps = max(round_.steps - ramp - 1, 1)
    falls = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, last, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, alpha=last / peak if peak else 0.0),
    }
    return np.asarray(falls[round_.schedule]()(step - ramp)).item()


def _sides(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """A layer's matrix: the residual stream on one side, what it is projected to or from on the other."""
    others = tuple(at for at, name in enumerate(axes) if name not in ("layers", "embed"))
    if axes[0] != "layers" or "embed" not in axes or not others:
        return None
    return MuonDimensionNumbers(axes.index("embed"), others)


def _decayed(weights: Any) -> Any:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(decays, weights)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)
