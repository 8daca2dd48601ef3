"""The jitted, sharded update: gradients added up over micro-batches, then one step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkv.config import GrpoConfig, ModelConfig, OptimizerConfig, PolicyLoss, UserError
from pkv.grpo.logprobs import token_logprobs
from pkv.grpo.losses import Logprobs, Loss, Supervised, token_losses
from pkv.grpo.optimizer import make_optimizer
from pkv.grpo.packing import Layout, empty
from pkv.hosts import gather
from pkv.mesh import BATCH_AXES, HEAD_AXES, TIME_AXIS, TRAINING_RULES, batch_sharding, replicated, shardings
from pkv.model import SEGMENTS, Arch, Kernel, Params, choose_kernel, forward, join, split, unstack_layers, weight_axes
from pkv.model.arithmetic import crossover
from pkv.records import Batch

Arrays = dict[str, jax.Array]
FEW_LAYERS = 8  # at most so many are unrolled, which compiles the longer the more there are


class TrainState(NamedTuple):
    """Everything that a step changes: what is trained (see `pkv.model.split`), in float32, and the optimizer's moments.

    Both are sharded by TRAINING_RULES.
    """

    params: Params
    optimizer: Any


class Learner:
    """Compiled gradient and update functions for one architecture on one mesh; the state goes in and comes out.

    frozen: the weights that no step changes, from `pkv.model.split`; None where there are none. reference: the weights
    from which a loss may measure its divergence, from `reference_weights`. Raises UserError for heads that the mesh's
    sequence axis doesn't divide.
    """

    def __init__(
        self,
        arch: Arch,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        frozen: Params | None = None,
        reference: Params | None = None,
    ) -> None:
        self.mesh = mesh
        self._arch, self._model, self._frozen, self._reference = arch, model, frozen, reference
        ways = mesh.shape["tensor"] * mesh.shape["sequence"]
        if mesh.shape["sequence"] > 1 and arch.heads % ways:
            raise UserError(
                f"mesh.sequence: {arch.heads} heads are not divisible by {' × '.join(HEAD_AXES)} = {ways}; "
                "change the mesh"
            )
        # A scan stacks what the backward pass will need: on a CPU a sixth of the update's time, on a GPU twice the
        # memory. But a scan's gradient is added up in place, and where layers are computed again little is stacked.
        platform, spread = mesh.devices.flat[0].platform, mesh.size > mesh.shape["data"]
        few, kept = arch.layers <= FEW_LAYERS, model.remat == "none"
        self._unrolled = few if platform == "cpu" else platform == "gpu" and not spread and kept
        self._kernel: Kernel = choose_kernel(model.attention, mesh, arch, model.dtype)
        self._optimizer = make_optimizer(optimizer, arch)
        self._gradient = jax.jit(self._add_gradient, static_argnames=("loss", "segments"), donate_argnames=("sums",))
        self._apply = jax.jit(self._apply_gradient, donate_argnames="state")
        self._logprobs = jax.jit(self._only_logprobs, static_argnames="segments")

    def layout(self, config: GrpoConfig, budget: int | None = None) -> Layout:
        """How `pack` makes batches for this learner; budget: max_new_tokens, or None for demonstrations."""
        return Layout(
            config.row_tokens,
            config.micro_rows,
            share_prompts=config.share_prompts and self._kernel == "xla",
            rows_multiple=math.prod(self.mesh.shape[name] for name in BATCH_AXES),
            time_multiple=self.mesh.shape[TIME_AXIS],
            crossover=crossover(self._arch),
            normalise=config.loss.normalise if budget else "tokens",
            budget=budget or 1,
            hosts=jax.process_count(),
            most_trees=SEGMENTS[-1] - 1 if self._kernel == "cudnn" else 0,  # the row's padding is one too
        )

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
        weights = self._places(params)
        shapes = {jax.tree_util.keystr(path): weight.shape for path, weight in jax.tree.leaves_with_path(params)}
        placed = {jax.tree_util.keystr(path): where for path, where in jax.tree.leaves_with_path(weights)}

        def place(path: tuple[Any, ...], array: Any) -> Any:
            names = (jax.tree_util.keystr(path[a:b]) for b in range(len(path), 0, -1) for a in range(b))
            name = next((name for name in names if name in placed), None)
            if name is None or array.ndim != len(shapes[name]):
                return replicated(self.mesh)
            spec = (*placed[name].spec, *(None,) * array.ndim)[: array.ndim]
            alike = zip(spec, array.shape, shapes[name], strict=True)  # of a scale the last axis is 1
            return NamedSharding(self.mesh, PartitionSpec(*(axes if a == b else None for axes, a, b in alike)))

        state = jax.eval_shape(self._optimizer.init, params)
        return TrainState(weights, jax.tree_util.tree_map_with_path(place, state))

    def update(
        self,
        state: TrainState,
        minibatches: Sequence[Sequence[Batch]],
        loss: Loss,
        learning_rate: float,
        epochs: int = 1,
    ) -> tuple[TrainState, dict[str, float]]:
        """An optimizer step on every minibatch, a list of micro-batches from `pack`, `epochs` times; also statistics.

        With one step in all the update is exactly on-policy, and needs no separate pass for the old log-probabilities.
        A step whose gradient isn't finite changes nothing; one without any token to train on is not computed.
        Statistics: skipped, the share of steps whose gradient wasn't finite; and where anything was computed, means
        over the trained tokens and over the steps that changed something, if any did: loss, entropy (nats),
        clipped_low, clipped_high and rejected (shares), kl_sampler (mean of r - log r - 1 with r the ratio of the
        trainer's to the sampler's probability), kl_reference (of a loss that has one), gradient_norm (before clipping).
        Raises ValueError for a loss whose reference the learner lacks.
        """
        held_to_reference = isinstance(loss, PolicyLoss) and loss.kl_weight > 0
        if held_to_reference and self._reference is None:
            raise ValueError("update: the loss asks for a divergence, and the learner has no reference")
        counts = self._tokens(minibatches)
        minibatches = [micros for micros, count in zip(minibatches, counts, strict=True) if count]
        if not minibatches:  # a mean over no tokens is no number: an entropy of 0 would be said to have collapsed
            return state, {"skipped": 0.0}
        segments = self._most_segments([micro for micros in minibatches for micro in micros])
        with jax.set_mesh(self.mesh):
            placed = [[self._place(micro) for micro in micros] for micros in minibatches]
            for micro in (micro for micros in placed for micro in micros):
                if epochs * len(placed) > 1:
                    micro["old_logprobs"] = self._logprobs(state.params, self._frozen, micro, segments=segments)
                if held_to_reference:
                    micro["reference_logprobs"] = self._logprobs(self._reference, None, micro, segments=segments)
            tokens = [count for count in counts if count]
            found = []
            for micros, count in [*zip(placed, tokens, strict=True)] * epochs:
                state, statistics = self._step(state, micros, count, loss, learning_rate, segments)
                found.append(statistics)
            skipped = [float(one["skipped"]) for one in found]
            sound = [one for one, bad in zip(found, skipped, strict=True) if not bad] or found
            means = {name: float(sum(one[name] for one in sound)) / len(sound) for name in sound[0]}
            return state, means | {"skipped": sum(skipped) / len(skipped)}

    def gradient(self, params: Params, micros: Sequence[Batch], loss: Loss) -> tuple[Params, dict[str, jax.Array]]:
        """The loss's gradient at what is trained, float32, summed over the micro-batches of one step; also statistics.

        Exactly on-policy, and without a divergence from a reference: what `update` applies where it makes one step.
        """
        with jax.set_mesh(self.mesh):
            placed, segments = list(map(self._place, micros)), self._most_segments(micros)
            return self._summed(params, placed, self._tokens([micros])[0], loss, segments)

    def lower(
        self, state: TrainState, rows: int, length: int, loss: PolicyLoss, steps: int = 1
    ) -> dict[str, jax.stages.Lowered]:
        """Every program of an update on micro-batches [rows, length], for devices that need not be there.

        state: from `template`. steps: of the optimizer on one rollout batch; with several the old log-probabilities
        are computed.
        """
        place = batch_sharding(self.mesh)
        describe = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)  # noqa: E731
        micro = jax.tree.map(describe, vars(empty(rows, length)))
        init = jax.jit(self._optimizer.init, out_shardings=self.state_shardings(state.params).optimizer)
        found = {"init": init.lower(state.params)}
        with jax.set_mesh(self.mesh):
            for name, asked, weights in (
                ("old", steps > 1, (state.params, self._frozen)),
                ("reference", loss.kl_weight > 0, (self._reference, None)),
            ):
                if asked:
                    found[f"{name}_logprobs"] = self._logprobs.lower(*weights, micro, segments=SEGMENTS[-1])
            for name in [name for name in found if name != "init"]:
                micro = {**micro, name: describe(jax.ShapeDtypeStruct((rows, length), jnp.float32))}
            sums = state.params, {name: jax.ShapeDtypeStruct((), jnp.float32) for name in STATISTICS}
            given = state.params, self._frozen, sums, micro, 1.0
            found["gradient"] = self._gradient.lower(*given, loss=loss, segments=SEGMENTS[-1])
            found["apply"] = self._apply.lower(state, state.params, 1.0)
        return found

    def _step(
        self,
        state: TrainState,
        micros: Sequence[Arrays],
        tokens: float,
        loss: Loss,
        learning_rate: float,
        segments: int,
    ) -> tuple[TrainState, Arrays]:
        gradient, statistics = self._summed(state.params, micros, tokens, loss, segments)
        state, norm, skipped = self._apply(state, gradient, learning_rate)
        return state, {**statistics, "gradient_norm": norm, "skipped": skipped}

    def _summed(
        self, params: Params, micros: Sequence[Arrays], tokens: float, loss: Loss, segments: int
    ) -> tuple[Params, Arrays]:
        sums = (jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros(()) for name in STATISTICS})
        for micro in micros:
            sums = self._gradient(params, self._frozen, sums, micro, max(tokens, 1.0), loss=loss, segments=segments)
        gradient, statistics = sums
        if not any("reference_logprobs" in micro for micro in micros):
            del statistics["kl_reference"]  # 0 would say that the policy hasn't moved
        return gradient, statistics

    def _tokens(self, minibatches: Sequence[Sequence[Batch]]) -> list[float]:
        """How many each minibatch trains, of all hosts."""
        own = [float(sum(micro.mask.sum() for micro in micros)) for micros in minibatches]
        return [sum(counts) for counts in zip(*gather(own), strict=True)]

    def _place(self, batch: Batch) -> Arrays:
        """This host's rows as its part of a micro-batch."""
        place = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(place, array) for name, array in vars(batch).items()}

    def _most_segments(self, micros: Sequence[Batch]) -> int:
        """Of a row, as far as the kernel needs to know: few sizes, so that few programs are compiled.

        Of several hosts, which see their own rows only, it is the most that there may be.
        """
        if self._kernel != "cudnn" or jax.process_count() > 1:
            return SEGMENTS[-1]
        needed = 1 + max((int(micro.segments.max(initial=0)) for micro in micros), default=0)
        return next(size for size in SEGMENTS if size >= needed)

    def _only_logprobs(self, params: Params, frozen: Params | None, micro: Arrays, *, segments: int) -> jax.Array:
        return self._predict(join(params, frozen), micro, segments)[0]

    def _predict(self, params: Params, micro: Arrays, segments: int) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _ = forward(
            unstack_layers(params, self._arch) if self._unrolled else params,
            self._arch,
            micro["tokens"],
            micro["positions"],
            segments_BT=micro["segments"],
            branches_BT=micro["branches"] if self._kernel == "xla" else None,
            dtype=jnp.dtype(self._model.dtype),
            remat=self._model.remat,
            kernel=self._kernel,
            most_segments=segments,
        )
        return token_logprobs(params, self._arch, hidden_BTD, micro["targets"])

    def _add_gradient(
        self,
        params: Params,
        frozen: Params | None,
        sums: Any,
        micro: Arrays,
        tokens: jax.Array,
        *,
        loss: Loss,
        segments: int,
    ) -> Any:
        def total(params: Params) -> tuple[jax.Array, Arrays]:
            now, entropy = self._predict(join(params, frozen), micro, segments)
            old = micro.get("old_logprobs", jax.lax.stop_gradient(now))
            sampler = old if isinstance(loss, Supervised) else micro["sampler_logprobs"]
            # What isn't trained on may be far off in one of them, and 0 times the exponential of that is no number.
            trained = lambda one: jnp.where(micro["mask"] > 0, one, 0.0)  # noqa: E731
            reference = trained(micro["reference_logprobs"]) if "reference_logprobs" in micro else None
            logprobs = Logprobs(trained(now), trained(old), trained(sampler), reference)
            average = partial(sequence_means, mask_BT=micro["mask"], branches_BT=micro["branches"])
            losses = token_losses(loss, logprobs, entropy, micro["advantages"], average)
            difference = logprobs.old - logprobs.sampler
            watched = losses._asdict() | {
                "entropy": entropy,
                "kl_sampler": jnp.exp(difference) - difference - 1,
            }
            means = {name: jnp.sum(micro["mask"] * watched[name]) / tokens for name in STATISTICS}
            means["loss"] = jnp.sum(micro["weights"] * losses.loss)
            return means["loss"], means

        loss_of_micro, backward, means = cast(Any, jax.vjp(total, params, has_aux=True))
        ones, (gradient, means_before) = jnp.ones_like(loss_of_micro), sums
        if self._unrolled:  # in place would take no less memory then, and half as long again to compile
            gradient = jax.tree.map(jnp.add, gradient, backward(ones)[0])
        else:  # layer by layer as the backward pass goes, in place: a micro-batch's own gradient is never whole
            summed = jax.tree.map(jax.new_ref, gradient)
            backward.with_refs(summed)(ones)
            gradient = jax.tree.map(jax.freeze, summed)
        # Where it was, or the next micro-batch would be another program.
        gradient = jax.lax.with_sharding_constraint(gradient, self._places(params))
        return gradient, jax.tree.map(jnp.add, means_before, means)

    def _places(self, params: Params) -> Any:
        """Where what is trained lies, and its gradient."""
        return shardings(weight_axes(params, self._arch), params, self.mesh, TRAINING_RULES)

    def _apply_gradient(
        self, state: TrainState, gradient: Params, learning_rate: jax.Array
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        step, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda weight, change: weight + learning_rate * change, state.params, step)
        norm = optax.tree.norm(gradient)
        sound = jnp.isfinite(norm)
        kept = jax.tree.map(partial(jnp.where, sound), TrainState(params, optimizer), state)
        return kept, norm, 1.0 - sound


def reference_weights(params: Params, dtype: Any) -> Params:
    """The weights as they are now, in `dtype`, whatever updates come; of a model with adapters its base, not copied."""
    _, base = split(params)
    copy = jax.jit(lambda weights: jax.tree.map(lambda weight: jnp.copy(weight).astype(dtype), weights))
    return copy(params) if base is None else base


def sequence_means(x_BT: jax.Array, *, mask_BT: jax.Array, branches_BT: jax.Array) -> jax.Array:
    """The mean of x over the trained tokens of each token's sequence, float32 [B, T]."""
    T = x_BT.shape[1]
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=T + 1))
    sums_BS, counts_BS = add(x_BT * mask_BT, branches_BT), add(mask_BT, branches_BT)
    return jnp.take_along_axis(sums_BS / jnp.maximum(counts_BS, 1.0), branches_BT, axis=1)


STATISTICS = ("loss", "entropy", "clipped_low", "clipped_high", "rejected", "kl_sampler", "kl_reference")
