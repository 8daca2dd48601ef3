"""The jitted, sharded update: gradients added up over micro-batches, then one step of the optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pkv.config import ModelConfig, OptimizerConfig
from pkv.grpo.logprobs import token_logprobs
from pkv.grpo.losses import Loss, Supervised, token_losses
from pkv.grpo.optimizer import make_optimizer
from pkv.mesh import TRAINING_RULES, batch_sharding, replicated, shardings
from pkv.model import Arch, Kernel, Params, choose_kernel, forward, join, split, weight_axes
from pkv.records import Batch

Arrays = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes: what is trained (see `pkv.model.split`), in float32, and the optimizer's moments.

    Both are sharded by TRAINING_RULES.
    """

    params: Params
    optimizer: Any


class Learner:
    """Compiled gradient and update functions for one architecture on one mesh; the state goes in and comes out.

    frozen: the weights that no step changes, from `pkv.model.split`; None where there are none.
    """

    def __init__(
        self, arch: Arch, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, frozen: Params | None = None
    ) -> None:
        self.mesh = mesh
        self._arch, self._model, self._frozen = arch, model, frozen
        self._kernel: Kernel = choose_kernel(model.attention, mesh, arch, model.dtype)
        self._optimizer = make_optimizer(optimizer, arch)
        self._gradient = jax.jit(self._add_gradient, static_argnames="loss", donate_argnames=("sums",))
        self._apply = jax.jit(self._apply_gradient, donate_argnames="state")
        self._logprobs = jax.jit(lambda params, frozen, micro: self._predict(join(params, frozen), micro)[0])

    def init(self, params: Params) -> TrainState:
        """A fresh state around what is trained of float32 weights, laid out by TRAINING_RULES."""
        params, _ = split(params)
        placed = self.state_shardings(params)
        params = jax.device_put(params, placed.params)
        return TrainState(params, jax.jit(self._optimizer.init, out_shardings=placed.optimizer)(params))

    def template(self, params: Params) -> TrainState:
        """What `init` would make of weights, or of their shapes: every array's shape, dtype and place, no numbers."""
        params, _ = split(params)
        shapes = TrainState(params, jax.eval_shape(self._optimizer.init, params))

        def describe(array: Any, place: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

        return jax.tree.map(describe, shapes, self.state_shardings(params))

    def state_shardings(self, params: Params) -> TrainState:
        """Where every array of the state lies: moments beside their weights, scalars everywhere."""
        weights = shardings(weight_axes(params, self._arch), params, self.mesh, TRAINING_RULES)
        placed = {jax.tree_util.keystr(path): where for path, where in jax.tree.leaves_with_path(weights)}

        def place(path: tuple[Any, ...], _: Any) -> Any:
            names = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
            return next((placed[name] for name in names if name in placed), replicated(self.mesh))

        shapes = jax.eval_shape(self._optimizer.init, params)
        return TrainState(weights, jax.tree_util.tree_map_with_path(place, shapes))

    def update(
        self, state: TrainState, batch: Batch, loss: Loss, learning_rate: float, micro_rows: int, epochs: int = 1
    ) -> tuple[TrainState, dict[str, float]]:
        """`epochs` optimizer steps on one batch; also its statistics, means over the response tokens.

        With one epoch the update is exactly on-policy and no separate pass for the old log-probabilities is needed.
        Statistics: loss, entropy (nats), clipped (share of tokens), kl_sampler (mean of r - log r - 1 with r the ratio
        of the trainer's to the sampler's probability), gradient_norm (before clipping).
        """
        with jax.set_mesh(self.mesh):
            return self._update(state, batch, loss, learning_rate, micro_rows, epochs)

    def _update(
        self, state: TrainState, batch: Batch, loss: Loss, learning_rate: float, micro_rows: int, epochs: int
    ) -> tuple[TrainState, dict[str, float]]:
        micros = [self._micro(batch, start, micro_rows) for start in range(0, len(batch.tokens), micro_rows)]
        tokens = jnp.float32(max(float(batch.mask.sum()), 1.0))
        if epochs > 1:
            for micro in micros:
                micro["old_logprobs"] = self._logprobs(state.params, self._frozen, micro)
        statistics: Arrays = {}
        for _ in range(epochs):
            sums = (jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(()) for name in STATISTICS})
            for micro in micros:
                sums = self._gradient(state.params, self._frozen, sums, micro, tokens, loss=loss)
            gradient, statistics = sums
            state, norm = self._apply(state, gradient, jnp.float32(learning_rate))
            statistics["gradient_norm"] = norm
        return state, {name: float(value) for name, value in statistics.items()}

    def _micro(self, batch: Batch, start: int, rows: int) -> Arrays:
        length = _used_length(batch.segments[start : start + rows])
        fields = {f.name: getattr(batch, f.name)[start : start + rows, :length] for f in dataclasses.fields(batch)}
        short = rows - len(fields["tokens"])
        padded = {name: np.pad(array, ((0, short), (0, 0))) for name, array in fields.items()}
        return jax.device_put(padded, batch_sharding(self.mesh))

    def _predict(self, params: Params, micro: Arrays) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _ = forward(
            params,
            self._arch,
            micro["tokens"],
            micro["positions"],
            segments_BT=micro["segments"],
            dtype=jnp.dtype(self._model.dtype),
            remat=self._model.remat,
            kernel=self._kernel,
        )
        return token_logprobs(params, self._arch, hidden_BTD, micro["targets"])

    def _add_gradient(
        self, params: Params, frozen: Params | None, sums: Any, micro: Arrays, tokens: jax.Array, *, loss: Loss
    ) -> Any:
        def total(params: Params) -> tuple[jax.Array, Arrays]:
            logprobs, entropy = self._predict(join(params, frozen), micro)
            old = micro.get("old_logprobs", jax.lax.stop_gradient(logprobs))
            sampler = old if isinstance(loss, Supervised) else micro["sampler_logprobs"]
            losses, clipped = token_losses(loss, logprobs, old, sampler, micro["advantages"])
            difference = old - sampler
            mismatch = jnp.exp(difference) - difference - 1
            parts = {"loss": losses, "entropy": entropy, "clipped": clipped, "kl_sampler": mismatch}
            means = {name: jnp.sum(micro["mask"] * part) / tokens for name, part in parts.items()}
            return means["loss"], means

        gradient, means = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(jnp.add, sums, (gradient, means))

    def _apply_gradient(
        self, state: TrainState, gradient: Params, learning_rate: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        step, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda weight, change: weight + learning_rate * change, state.params, step)
        return TrainState(params, optimizer), optax.tree.norm(gradient)


def _used_length(segments_BT: np.ndarray) -> int:
    """Where the padding at every row's end begins, in eighths of a row: at most eight programs are compiled."""
    T = segments_BT.shape[1]
    used = int(np.flatnonzero(segments_BT.any(axis=0)).max(initial=0)) + 1
    step = -(-T // 8)
    return min(T, -(-used // step) * step)


STATISTICS = ("loss", "entropy", "clipped", "kl_sampler")
