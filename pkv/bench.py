"""How fast sampling, the update, and a step of both are on this machine, on made-up data. No text and no score here.

Every run does the same work: prompts, draws and lengths depend on the seed only, and the learning rate is 0, which
costs what any other costs and leaves the policy as it was. So the first run compiles everything that the measured ones
need; what is compiled in them all the same is counted as `compilations_in_runs`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from pkv.competition import Tokenizer
from pkv.compiling import Compilations
from pkv.config import Config, UserError
from pkv.evaluate import Policy, load_policy
from pkv.evaluate.policy import sampling_mesh
from pkv.grpo import Learner, advantages_by_reward, pack
from pkv.grpo import Sequence as TrainingSequence
from pkv.mesh import BATCH_AXES, make_mesh
from pkv.model import Arch, Params, join, split
from pkv.model.arithmetic import update_flops
from pkv.rates import matrix_tflops, read_gbs
from pkv.sampling import Completion, Engine, Request, compile_ahead, device_bytes, row_keys
from pkv.tracking import Clock, Progress
from pkv.train.journal import device_peaks_gb, peak_memory_gb

What = Literal["sample", "update", "step"]
Run = Callable[[Clock], list[int]]  # one run: seconds by phase into the clock; returns each response's tokens


@dataclass(frozen=True)
class Job:
    """A run that can be done again and again; trainer: of the update in it, engine: of the sampling; None without.

    weights: what all of a run's steps read, where there is nothing in it but those.
    """

    run: Run
    trainer: Trainer | None = None
    engine: Engine | None = None
    weights: Params | None = None


MEAN_SHARE = 4  # made-up responses have on average max_new_tokens / 4 tokens, before they are cut
LOGPROB_NOISE = 0.01  # how far made-up log-probabilities lie around those of a policy that knows nothing, nats


@dataclass(frozen=True)
class Task:
    """The work of a run: P prompts of `prompt_tokens` random text ids, G responses each, of at most `max_new_tokens`.

    Raises UserError where rows of `config.grpo.row_tokens` are too short for that.
    """

    config: Config
    prompt_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        needed, row_tokens = self.longest - 1, self.config.grpo.row_tokens
        if row_tokens < needed:
            raise UserError(
                f"--row-tokens {row_tokens}: a prompt of {self.prompt_tokens} tokens and {self.max_new_tokens} new "
                f"ones need {needed}: raise it or lower them"
            )

    @property
    def longest(self) -> int:
        """A prompt and its longest response, tokens."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def micro_rows(self) -> int:
        """B of one forward and backward pass: as asked, rounded up to what the devices divide."""
        mesh = make_mesh(self.config.mesh)
        ways = math.prod(mesh.shape[name] for name in BATCH_AXES)
        return -(-self.config.grpo.micro_rows // ways) * ways


def bench(what: What, task: Task, runs: int) -> dict[str, Any]:
    """Measure `runs` runs after one that compiles; medians, what every run took, and what was compiled.

    tokens_per_s: response tokens that count, so up to and with the first end token, a second of the whole run. seconds:
    by phase, the phases of a training step. compile_s: tracing, lowering and compiling before the measured runs.
    peak_memory_gb: GiB since the process began, loading and compiling included; devices: of each that keeps count.
    kv_ratio: memory for keys and values over the sum of the live rows' lengths, prompts counted for every row.
    update_tflops: the model's own arithmetic a second of the update, with every prompt counted as often as it has
    responses; matrix_tflops: what bare matrix products reach on all devices here. read_gbs: what decoding must read of
    a device, each prompt once for all its samples, a second of the whole run; memory_gbs: what bare reading reaches.
    Raises UserError.
    """
    measured = []
    with Progress(runs + 1, f"bench {what}") as progress:
        with Compilations() as before:
            job = BUILDERS[what](task)
            job.run(Clock())
        progress.advance(1, compile_s=before.seconds)
        for _ in range(runs):
            clock = Clock()
            with Compilations() as inside:
                lengths = job.run(clock)
            measured.append(_figures(lengths, clock.seconds, inside))
            if job.trainer is not None:
                measured[-1]["update_tflops"] = job.trainer.tflops(lengths) / clock.seconds["update"]
            if job.engine is not None:
                measured[-1]["kv_ratio"] = job.engine.usage.ratio
            if job.weights is not None and job.engine is not None:
                measured[-1]["read_gbs"] = bytes_read(job.weights, job.engine) / clock.seconds["sample"] / 1e9
            progress.advance(1, tokens_per_s=measured[-1]["tokens_per_s"])
    return {
        "bench": what,
        "model": task.config.model.path,
        "settings": _settings(what, task),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        **{name: statistics.median(one[name] for one in measured) for name in ("tokens_per_s", "step_s")},
        "seconds": {
            phase: statistics.median(one["seconds"][phase] for one in measured) for phase in measured[0]["seconds"]
        },
        "lengths": {
            "mean": statistics.fmean(one["lengths"]["mean"] for one in measured),
            "longest": max(one["lengths"]["longest"] for one in measured),
        },
        **({"kv_ratio": statistics.median(one["kv_ratio"] for one in measured)} if job.engine else {}),
        **(_against_matrices(measured, task) if job.trainer else {}),
        **(_against_memory(measured) if job.weights is not None else {}),
        "compile_s": before.seconds,
        "compilations": before.count,
        "compilations_in_runs": sum(one["compilations"] for one in measured),
        "peak_memory_gb": {"host": peak_memory_gb(), "devices": device_peaks_gb()},
        "runs": measured,
    }


def in_words(result: Mapping[str, Any]) -> str:
    """A result for people, in one line."""
    phases = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in result["seconds"].items())
    lengths, peak = result["lengths"], result["peak_memory_gb"]
    devices = f", {max(peak['devices']):.1f} GB on a device" if peak["devices"] else ""
    memory = f", that for keys and values {result['kv_ratio']:.2f} of what lives" if "kv_ratio" in result else ""
    share = ""
    if "update_tflops" in result:
        share = f", {result['update_tflops'] / result['matrix_tflops']:.0%} of the matrix rate"
    if "read_gbs" in result:
        share = f", {result['read_gbs'] / result['memory_gbs']:.0%} of the memory's rate"
    return (
        f"{result['bench']}: {result['tokens_per_s']:,.0f} tokens/s; {result['step_s']:.3g} s a run ({phases}{share}); "
        f"{result['compilations']} programs compiled in {result['compile_s']:.3g} s before the runs, "
        f"{result['compilations_in_runs']} in them; responses of {lengths['mean']:.0f} tokens, the longest "
        f"{lengths['longest']}; peak memory {peak['host']:.1f} GB{devices}{memory}"
    )


# What a run does.


def sampling_run(task: Task) -> Job:
    """Sampling alone, from weights laid out as `pkv sample` lays them out."""
    config = task.config
    mesh = sampling_mesh(config.model.path)
    policy = load_policy(config.model.path, mesh, model=config.model, dtype=config.model.dtype)
    arch = _arch_for(task, policy, max(task.longest, policy.trained_rows))
    engine = Engine(arch, config.sampling, policy.tokenizer.stop_ids, mesh, config.model.dtype)
    weights, requests = engine.load(policy.params), draw_requests(task, draw_prompts(task, policy.tokenizer))
    del policy  # its weights are another copy
    compile_ahead(engine, weights, requests)

    def run(clock: Clock) -> list[int]:
        with clock("sample"):
            return [len(done.tokens) for done in engine.sample(weights, requests)]

    return Job(run, engine=engine, weights=weights)


def update_run(task: Task) -> Job:
    """The update alone, on made-up responses."""
    policy = load_policy(task.config.model.path, make_mesh(task.config.mesh), model=task.config.model)
    trainer = Trainer(task, policy)
    sequences = draw_responses(task, policy.tokenizer, trainer.arch.vocab_size)

    def run(clock: Clock) -> list[int]:
        with clock("update"):
            trainer.update(sequences)
        return [len(sequence.response) for sequence in sequences]

    return Job(run, trainer)


def step_run(task: Task) -> Job:
    """Sampling, then the update on what was sampled; advantages are made up, see `credit`."""
    config = task.config
    mesh = make_mesh(config.mesh)
    policy = load_policy(config.model.path, mesh, model=config.model)
    trainer = Trainer(task, policy)
    engine = Engine(trainer.arch, config.sampling, policy.tokenizer.stop_ids, mesh, config.model.dtype)
    frozen = None if trainer.frozen is None else engine.load(trainer.frozen)
    prompts = draw_prompts(task, policy.tokenizer)
    requests = draw_requests(task, prompts)

    def run(clock: Clock) -> list[int]:
        with clock("sample"):
            done = list(engine.sample(join(engine.load(trainer.params), frozen), requests))
        with clock("update"):
            trainer.update(credit(task, prompts, done))
        return [len(completion.tokens) for completion in done]

    return Job(run, trainer, engine)


BUILDERS: Mapping[str, Callable[[Task], Job]] = {"sample": sampling_run, "update": update_run, "step": step_run}


class Trainer:
    """The learner and its state, built as a run builds them; `arch` is for rows of the task's length."""

    def __init__(self, task: Task, policy: Policy) -> None:
        config = task.config
        self.arch = _arch_for(task, policy, config.grpo.row_tokens)
        _, self.frozen = split(policy.params)
        self._loss, self._prompt_tokens = config.grpo.loss, task.prompt_tokens
        self._learner = Learner(self.arch, config.model, config.optimizer, make_mesh(config.mesh), self.frozen)
        self._layout = self._learner.layout(dataclasses.replace(config.grpo, micro_rows=task.micro_rows))
        self._state = self._learner.init(policy.params)

    @property
    def params(self) -> Params:
        """What is trained."""
        return self._state.params

    def tflops(self, lengths: Sequence[int]) -> float:
        """The arithmetic of an update on responses of these lengths, 10^12 operations."""
        sizes = ((self._prompt_tokens + length - 1, length) for length in lengths)
        return update_flops(self.arch, sizes, self.frozen is not None) / 1e12

    def update(self, sequences: Sequence[TrainingSequence]) -> None:
        """Pack and update as the loop does, and wait until it is done."""
        state, _ = self._learner.update(self._state, [pack(sequences, self._layout)], self._loss, 0.0)
        self._state = jax.block_until_ready(state)


def _arch_for(task: Task, policy: Policy, context: int) -> Arch:
    """The policy's architecture for rows of `context` tokens. Raises UserError where a response has no room."""
    room = policy.arch.max_positions - task.prompt_tokens
    if task.max_new_tokens > room:
        raise UserError(
            f"--max-new-tokens {task.max_new_tokens}: the model holds {policy.arch.max_positions} positions, and a "
            f"prompt takes {task.prompt_tokens}: lower it or --prompt-tokens"
        )
    return policy.arch.for_context(context)


# What a run is given.


def draw_prompts(task: Task, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Random text ids, int32 [T] for each of the P prompts: no control and no end token."""
    draw = np.random.default_rng((task.config.seed, 0))
    ids = np.setdiff1d(tokenizer.text_ids, tokenizer.stop_ids)
    return [draw.choice(ids, task.prompt_tokens).astype(np.int32) for _ in range(task.config.grpo.prompts)]


def draw_requests(task: Task, prompts: Sequence[np.ndarray]) -> list[Request]:
    """What the engine is asked, the same in every run."""
    names = [str(number) for number in range(len(prompts))]
    keys = row_keys(task.config.seed, "bench", 0, names, task.config.grpo.samples)
    return [Request(prompt, key, task.max_new_tokens) for prompt, key in zip(prompts, keys, strict=True)]


def draw_responses(task: Task, tokenizer: Tokenizer, vocab_size: int) -> list[TrainingSequence]:
    """G made-up responses to each prompt: random text ids, lengths geometric, each with one random advantage.

    Their log-probabilities are those of a policy that knows nothing, with a little noise: near a random model's.
    """
    draw = np.random.default_rng((task.config.seed, 1))
    ids = np.setdiff1d(tokenizer.text_ids, tokenizer.stop_ids)
    found = []
    for prompt in draw_prompts(task, tokenizer):
        lengths = draw.geometric(min(1.0, MEAN_SHARE / task.max_new_tokens), task.config.grpo.samples)
        for length in np.minimum(lengths, task.max_new_tokens):
            advantages = np.full(length, draw.normal(), np.float32)
            logprobs = draw.normal(-math.log(vocab_size), LOGPROB_NOISE, length).astype(np.float32)
            found.append(TrainingSequence(prompt, draw.choice(ids, length).astype(np.int32), advantages, logprobs))
    return found


def credit(task: Task, prompts: Sequence[np.ndarray], done: Sequence[Completion]) -> list[TrainingSequence]:
    """Every sampled response with a made-up advantage: its length modulo 7 is its reward, held against its group's.

    No text is scored, since a random model's text is noise: what scoring takes belongs to `pkv train`'s own figures.
    """
    config = task.config.grpo
    rewards_PG = np.zeros((len(prompts), config.samples))
    for one in done:
        rewards_PG[one.request, one.sample] = len(one.tokens) % 7
    (advantages_PG,) = advantages_by_reward(rewards_PG[None], config.scale, config.std_floor)
    return [
        TrainingSequence(
            prompts[one.request],
            one.tokens,
            np.full(len(one.tokens), advantages_PG[one.request, one.sample], np.float32),
            one.logprobs,
        )
        for one in done
    ]


# What a run took.


def _figures(lengths: Sequence[int], seconds: Mapping[str, float], inside: Compilations) -> dict[str, Any]:
    tokens, step_s = sum(lengths), sum(seconds.values())
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / step_s,
        "step_s": step_s,
        "seconds": dict(seconds),
        "lengths": {"mean": tokens / len(lengths), "longest": max(lengths)},
        "compilations": inside.count,
        "compile_s": inside.seconds,
    }


def _against_matrices(measured: Sequence[Mapping[str, Any]], task: Task) -> dict[str, float]:
    rate = matrix_tflops(task.config.model.dtype) * jax.device_count()
    return {"update_tflops": statistics.median(one["update_tflops"] for one in measured), "matrix_tflops": rate}


def _against_memory(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"read_gbs": statistics.median(one["read_gbs"] for one in measured), "memory_gbs": read_gbs()}


def bytes_read(weights: Params, engine: Engine) -> float:
    """Bytes that the steps of the last `sample` must read of a device: weights, keys and values.

    Of embeddings that don't give the scores too a step reads its tokens' rows only.
    """
    rows = sum(device_bytes(weights["embedding"])) if "unembedding" in weights else 0
    return engine.usage.steps * (sum(device_bytes(weights)) - rows) + engine.usage.read_bytes


def _settings(what: What, task: Task) -> dict[str, Any]:
    """What the figures were measured with; only what this bench reads."""
    config = task.config
    common = {
        "prompts": config.grpo.prompts,
        "samples": config.grpo.samples,
        "prompt_tokens": task.prompt_tokens,
        "max_new_tokens": task.max_new_tokens,
        "seed": config.seed,
        "dtype": config.model.dtype,
    }
    sampling = {name: getattr(config.sampling, name) for name in ("temperature", "slots", "segment")}
    update = {
        "row_tokens": config.grpo.row_tokens,
        "micro_rows": task.micro_rows,
        "share_prompts": config.grpo.share_prompts,
        "remat": config.model.remat,
    }
    return common | ({} if what == "update" else sampling) | ({} if what == "sample" else update)
