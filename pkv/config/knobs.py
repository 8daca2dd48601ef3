"""Every knob of pkv, typed, with its default and its bounds. Each room receives its own slice of `Config` only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""

    code = 2


class UnavailableError(UserError):
    """No mistake: the network or another host is not there; one line, but exit code 1, as trying again may help."""

    code = 1


class ConfigError(UserError):
    """A config that cannot be used."""


@dataclass(frozen=True)
class LoraConfig:
    """Training of low-rank adapters beside frozen weights; rank 0 trains the weights themselves."""

    rank: int = 0  # 32 is a good start, with a learning rate of 1e-5
    alpha: float = 32.0  # an adapter counts alpha / rank times
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")
    base: Literal["plain", "int8", "nf4"] = (
        "plain"  # how the frozen weights are kept: in model.dtype, or their layers' matrices in 8 or 4 bits
    )


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = ""  # a Hugging Face directory or a hub id; a relative path is looked up beside the config file first
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json and the tokenizer are read
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of compute; norms, softmax, logits and rotary tables stay 32-bit
    )
    # What the backward pass finds kept: everything; each layer's input and attention's result; its input; or that input
    # in the host's memory.
    remat: Literal["none", "cheap", "all", "offload"] = "none"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # of whole rows; auto: splash on TPU, cuDNN on GPU
    context: int = 0  # positions, where more than the checkpoint's own are wanted: stretched by YaRN; 0: its own
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1  # a row's positions, and in sampling its KV pages, lie on so many devices
    tensor: int = 1


@dataclass(frozen=True)
class PromptConfig:
    """The system prompt, one versioned file, the same for training, evaluation, chat and export."""

    system: str = "competition"  # a name in pkv/competition/prompts, or a path


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from (see `pkv.data.open_source` for what a SOURCE may be)."""

    train: str = "arithmetic:train"
    heldout: str = "arithmetic:heldout"
    # The curriculum by difficulty: problems that were solved by a smaller or larger share of their last group are drawn
    # `revisit` times as often as the others. The defaults switch it off.
    hardest: float = 0.0
    easiest: float = 1.0
    revisit: float = 0.1


@dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are drawn."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off; tokens less likely than this share of the likeliest one are not drawn
    stop: tuple[str, ...] = ()  # a response ends with the first of these texts in it
    slots: int = 64  # rows that decode at the same time
    segment: int = 32  # decode steps on the device between two visits of the host
    page_tokens: int = 0  # positions a page of the KV cache; 0: 128, but 64 on a CPU
    weights: Literal["plain", "int8"] = "plain"  # of layers: in model.dtype, or in 8 bits with a scale an output
    kv_cache: Literal["plain", "int8"] = "plain"  # in model.dtype, or in 8 bits with a scale a position and head
    attention: Literal["auto", "xla", "triton"] = "auto"  # over the KV cache's pages; auto: triton on a GPU that has it
    kv_memory_gb: float = 0.0  # of each device, for the KV cache; 0: most of what is free when sampling starts
    warm_up: bool = True  # a round's rollouts are compiled before its first step, the longest ones first


@dataclass(frozen=True)
class RewardConfig:
    """What is common to all rounds; weights and lengths are each round's own."""

    user_files: tuple[str, ...] = ()  # Python files with `rewards() -> dict[name, (owner, function)]`
    timeout_s: float = 2.0  # a reward that takes longer is unscored
    max_unscored_share: float = 0.1  # above this share of unscored rollouts in a step the run stops
    workers: int = 1  # scoring processes; 0 scores in the main process


@dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into steps."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, AdamW for the rest
    moments: Literal["float32", "bfloat16", "float8"] = "float32"  # how AdamW's are kept: 8, 4 or 2 bytes a weight
    b1: float = 0.9
    b2: float = 0.99
    momentum: float = 0.95  # muon's
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class PolicyLoss:
    """A surrogate of the policy gradient, and what is added to it."""

    # clipped: PPO's, with DAPO's higher upper clip (arXiv 2503.14476, equation 8); gspo: clips the ratio of the whole
    # sequence (2507.18071, equation 13); cispo: clips the weight of the gradient, and drops no token (2506.13585, 4).
    surrogate: Literal["clipped", "gspo", "cispo"] = "clipped"
    # How far a ratio may leave 1 below, and above; 0: what is usual, 0.2 and 0.28, and 3e-4 and 4e-4 for gspo.
    clip_low: float = 0.0
    clip_high: float = 0.0
    cap: float = 5.0  # cispo's largest weight
    dual_clip: float = 0.0  # with A < 0 the surrogate is at least this times A (1912.09729, equation 5); 0: off
    importance_cap: float = 2.0  # truncated importance sampling, per token, against the sampler's log-probabilities
    reject: float = 0.0  # a sequence whose geometric mean ratio to the sampler leaves [1/reject, reject] is left out
    # What the sum over tokens is divided by: all of them (DAPO); each one's sequence, then the sequences (GRPO); or the
    # sequences times max_new_tokens (Dr.GRPO).
    normalise: Literal["tokens", "sequences", "constant"] = "tokens"
    kl: Literal["k1", "k2", "k3"] = "k3"  # from the base model; k1 is taken off the advantages, k2 and k3 are losses
    kl_weight: float = 0.0
    entropy: float = 0.0  # the weight of a bonus for entropy


@dataclass(frozen=True)
class GrpoConfig:
    """One GRPO step."""

    prompts: int = 8  # P
    samples: int = 8  # G, rollouts a prompt
    credit: Literal["sequence", "block"] = "block"  # one scalar for all tokens, or each reward to its owner's tokens
    whole_trace: dict[str, float] = field(default_factory=lambda: {"correctness": 1.0})
    # with block credit: reward -> the share of its advantage that every token of the response gets
    scale: Literal["std", "floored_std", "none"] = (
        "floored_std"  # what a centred reward is divided by, within its group
    )
    std_floor: float = 0.25
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of a group
    # Scaled each by itself (GDPO, with whiten: responses and credit: sequence), or as one sum (credit: sequence).
    combine: Literal["rewards", "total"] = "rewards"
    # Advantages at unit deviation over the batch, in which tokens (REINFORCE++) or responses (GDPO) count the same;
    # with credit: sequence at mean 0 too.
    whiten: Literal["none", "tokens", "responses"] = "none"
    # What the judge's accuracy is compared with: its group; those of it with as many fighters right; all names that it
    # could have given there, each less its fighter's rate of being right in the batch, so that no favourite pays.
    judge_baseline: Literal["group", "alike", "rates"] = "alike"
    signal: tuple[str, ...] = ()  # rewards or families of which one must differ within a group; none: any with weight
    refills: int = 0  # groups without signal are replaced by others, so many times a step at most
    one_step_off: bool = False  # a step's rollouts are sampled while those of the step before are still being scored
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    epochs: int = 1  # passes over a rollout batch,
    minibatches: int = 1  # in so many updates each; one update in all is exactly on-policy
    mask_truncated: bool = False  # rollouts that ended at their budget give no gradient
    overlong_tokens: int = 0  # the last so many tokens of the budget are punished (DAPO's soft punishment); 0: none
    overlong_weight: float = 1.0  # what a response that reaches its budget loses by it
    row_tokens: int = 1024  # T of a packed row; longrope has its long factors where it is above the original window
    micro_rows: int = 4  # such rows in one forward and backward pass, or as many tokens in shorter ones
    # Responses are packed behind one copy of their prompt where that is less work; with XLA's attention, so not on TPU.
    share_prompts: bool = True


@dataclass(frozen=True)
class WarmupConfig:
    """A short supervised start on synthetic competitions; steps 0 leaves it out."""

    steps: int = 0
    demonstrations: int = 32  # a step
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    ramp_steps: int = 20  # linear increase at the start
    copying: float = 0.25  # share of demonstrations in which a later fighter copies an earlier one
    loose_layout: float = 0.4  # share whose layout is not the exact one
    mistakes: float = 0.3  # share of fighters that err: some mend it, most are passed over by the judge


@dataclass(frozen=True)
class RoundConfig:
    """One round of GRPO: data, not code."""

    name: str = ""
    steps: int = 0
    samples: int = 0  # rollouts a prompt; 0: grpo.samples
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # down to final_learning_rate
    ramp_steps: int = 0  # linear increase at the start
    final_learning_rate: float = 0.0
    weights: dict[str, float] = field(
        default_factory=dict
    )  # reward name -> weight; a family name sets all of its members
    length_optimum: int = 128  # a fighter's tokens that earn the most
    max_new_tokens: int = 1024
    budgets: tuple[int, ...] = ()  # max_new_tokens in equal parts of the round before, such as [2048, 4096, 8192]
    fighter_tokens: int = 0  # where a fighter's block has so many, it is closed by force; 0: never
    require: dict[str, float] = field(
        default_factory=dict
    )  # held-out metric -> the least it must have reached before the round


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out problems, at the start and the end of every round."""

    problems: int = 64
    samples: int = 1
    temperature: float = 0.0
    shown: int = 5  # problems whose answers are printed before and after


@dataclass(frozen=True)
class CheckpointConfig:
    """State on disk."""

    every: int = 20  # steps
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rounds: tuple[RoundConfig, ...] = ()
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


MUCH = 1e6  # more than anybody means, where an infinity would only make what is no number

# Bounds that a type cannot say: path -> (least, greatest).
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model.context": (0, math.inf),
    "model.lora.rank": (0, math.inf),
    "model.lora.alpha": (1e-6, MUCH),
    "data.hardest": (0.0, 1.0),
    "data.easiest": (0.0, 1.0),
    "data.revisit": (1e-6, 1.0),
    "sampling.temperature": (0.0, 100.0),
    "sampling.top_p": (1e-6, 1.0),
    "sampling.top_k": (0, math.inf),
    "sampling.min_p": (0.0, 1.0),
    "sampling.slots": (1, math.inf),
    "sampling.segment": (1, math.inf),
    "sampling.page_tokens": (0, math.inf),
    "sampling.kv_memory_gb": (0.0, MUCH),
    "rewards.timeout_s": (1e-3, MUCH),
    "rewards.max_unscored_share": (0.0, 1.0),
    "rewards.workers": (0, 1024),
    # At 1, which is what 32 bits make of more than that, moments stay 0 and a step is 0 / 0.
    "optimizer.b1": (0.0, 0.999999),
    "optimizer.b2": (0.0, 0.999999),
    "optimizer.momentum": (0.0, 0.999999),
    "optimizer.weight_decay": (0.0, MUCH),
    "optimizer.clip_norm": (1e-9, math.inf),
    "grpo.prompts": (1, math.inf),
    "grpo.samples": (2, math.inf),
    "grpo.std_floor": (1e-6, math.inf),
    "grpo.refills": (0, 100),
    "grpo.loss.clip_low": (0.0, 1.0),
    "grpo.loss.clip_high": (0.0, math.inf),
    "grpo.loss.cap": (1.0, math.inf),
    "grpo.loss.dual_clip": (0.0, math.inf),
    "grpo.loss.importance_cap": (1.0, math.inf),
    "grpo.loss.reject": (0.0, math.inf),
    "grpo.loss.kl_weight": (0.0, MUCH),
    "grpo.loss.entropy": (0.0, MUCH),
    "grpo.epochs": (1, math.inf),
    "grpo.minibatches": (1, math.inf),
    "grpo.overlong_tokens": (0, math.inf),
    "grpo.overlong_weight": (0.0, MUCH),
    "grpo.row_tokens": (8, math.inf),
    "grpo.micro_rows": (1, math.inf),
    "warmup.steps": (0, math.inf),
    "warmup.demonstrations": (1, math.inf),
    "warmup.learning_rate": (0.0, 1.0),
    "warmup.final_learning_rate": (0.0, 1.0),
    "warmup.ramp_steps": (0, math.inf),
    "warmup.copying": (0.0, 1.0),
    "warmup.loose_layout": (0.0, 1.0),
    "warmup.mistakes": (0.0, 1.0),
    "evaluate.problems": (1, math.inf),
    "evaluate.samples": (1, math.inf),
    "evaluate.temperature": (0.0, 100.0),
    "evaluate.shown": (0, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "rounds.*.steps": (0, math.inf),
    "rounds.*.samples": (0, math.inf),
    "rounds.*.learning_rate": (0.0, 1.0),
    "rounds.*.ramp_steps": (0, math.inf),
    "rounds.*.final_learning_rate": (0.0, 1.0),
    "rounds.*.length_optimum": (1, math.inf),
    "rounds.*.max_new_tokens": (1, math.inf),
    "rounds.*.fighter_tokens": (0, math.inf),
}
