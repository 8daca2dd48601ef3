"""The commands, one class each: its fields are its flags, and calling it runs it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from pkv.cli.output import Output, at_least, offsets_of, sampling_of
from pkv.config import UserError, find_config, load_config, parse_config

DOES_NOT_FIT = 3  # the exit code of a plan


@dataclass(frozen=True)
class Train:
    """Train a model: the warm-up if the config has one, then the rounds; the same command resumes."""

    config: Positional[str]
    """a YAML file, or a shipped config such as tiny; flags such as --rounds.format.steps 5 change what it says"""
    run: str | None = None  # the run directory; runs/NAME of the config unless given
    fresh: bool = False  # remove what the run directory holds and start anew
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        config = load_config(self.config, flags)
        folder = Path(self.run) if self.run else Path("runs") / find_config(self.config).stem
        from pkv import hosts
        from pkv.tracking import read_jsonl
        from pkv.train.loop import train
        from pkv.train.rounds import reward_budgets
        from pkv.train.summary import closing_summary

        out.say(reward_budgets(config))
        train(config, folder, self.fresh)
        if not hosts.leads():
            return
        out.say(closing_summary(folder))
        if out.json:
            out.record({"run": str(folder), "evaluations": read_jsonl(folder / "evaluations.jsonl")})


@dataclass(frozen=True)
class Eval:
    """Measure a model on problems: accuracy, format, judge, copying, lengths."""

    model: Positional[str]  # a Hugging Face directory, a hub id, or a run directory
    data: str  # arithmetic:heldout, a .jsonl, .json or .parquet file, or org/name[:config][:split]
    samples: int = 1  # answers to each problem
    limit: int | None = None  # at most so many problems
    temperature: float = 0.0  # 0: the likeliest token, always
    max_new_tokens: int | None = None  # of an answer; 1024, or what the model has room for, unless given
    system: str | None = None  # a system prompt's name or file; the model's own unless given
    seed: int = 0
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        sampling = sampling_of(self.seed, self.temperature)
        at_least("samples", self.samples)
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples}: at temperature 0 all are the same; give --temperature 1")
        from pkv.data import open_source

        problems = open_source(self.data, self.limit)
        from pkv.config import RewardConfig, RoundConfig
        from pkv.evaluate import evaluate, render_prompts, requests_for
        from pkv.evaluate.answering import open_model
        from pkv.hosts import share
        from pkv.rewards import DEFAULT_WEIGHTS, ScoringPool
        from pkv.sampling import compile_ahead
        from pkv.tracking import Progress

        with ScoringPool(DEFAULT_WEIGHTS, RoundConfig().length_optimum, RewardConfig()) as scoring:
            responder = open_model(self.model, sampling, self.system)
            prompts = render_prompts(responder.source.tokenizer, problems, responder.system)
            longest = max(len(prompt.tokens) for prompt in prompts)
            budget = responder.new_tokens(longest, self.max_new_tokens)
            source = responder.source_for(longest + budget)
            requests = requests_for(source, share(prompts), self.samples, budget, self.seed, "compile ahead")
            compile_ahead(source.engine, source.weights, requests)
            with Progress(len(prompts) * self.samples, "eval") as progress:
                evaluation = evaluate(
                    source,
                    prompts,
                    scoring,
                    samples=self.samples,
                    max_new_tokens=budget,
                    seed=self.seed,
                    on_rollout=lambda _: progress.advance(),
                )
        metrics = dict(sorted(evaluation.metrics.items()))
        measured = {"model": self.model, "data": self.data, "problems": len(problems), "samples": self.samples}
        table = "\n".join(f"{name:<32} {value:10.4f}" for name, value in metrics.items())
        out.result(table, measured | {"metrics": metrics})


@dataclass(frozen=True)
class Sample:
    """Answer the prompts of a file; a JSON line for each answer when it ends."""

    model: Positional[str]  # a Hugging Face directory, a hub id, or a run directory
    prompts: str  # JSON lines: id, prompt (text or messages), and raw: true for a prompt that is used as it stands
    samples: int = 1  # answers to each prompt
    max_new_tokens: int | None = None  # of an answer; 1024, or what the model has room for, unless given
    temperature: float = 1.0  # 0: the likeliest token, always
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    stop: tuple[str, ...] = ()  # texts that end an answer
    seed: int = 0
    system: str | None = None  # a system prompt's name or file; the model's own unless given
    json: bool = False  # JSON only on stdout, which it is anyway

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        sampling = sampling_of(self.seed, self.temperature, self.top_p, self.top_k, self.min_p, self.stop)
        at_least("samples", self.samples)
        from pkv.evaluate.answering import read_prompts, sample

        answers = sample(
            self.model,
            read_prompts(self.prompts),
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            sampling=sampling,
            system=self.system,
        )
        for answer in answers:
            out.record(answer)


@dataclass(frozen=True)
class Score:
    """Score completions by the rewards, on this machine's CPU; a JSON line for each."""

    file: Positional[str]  # JSON lines: id, question, answer, completion
    config: str | None = (
        None  # whose weights, lengths and tokenizer count; pkv's default weights and words unless given
    )
    round: str | None = None  # of the config; its last unless given
    json: bool = False  # JSON only on stdout, which it is anyway

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        from pkv.rewards import score_lines

        config = load_config(self.config) if self.config else None
        for line in score_lines(self.file, config, self.round, offsets_of(config)):
            out.record(line)


@dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal; `exit` or the end of input leaves."""

    model: Positional[str]  # a Hugging Face directory, a hub id, or a run directory
    once: str | None = None  # ask this one question and leave
    show_competition: bool = False  # unfold what happens behind the scenes
    temperature: float = 0.5
    max_new_tokens: int | None = None  # of a response; 1024, or what the model has room for, unless given
    seed: int = 0
    json: bool = False  # JSON only on stdout, a line a reply

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        # One row, looked at every 8 tokens: what is read while it is written must flow.
        sampling = dataclasses.replace(sampling_of(self.seed, self.temperature), slots=1, segment=8)
        from pkv.chat import read_questions, talk
        from pkv.evaluate.answering import open_model

        responder = open_model(self.model, sampling)
        screen = sys.stderr if out.json else out.results
        questions = read_questions(sys.stdin, screen) if self.once is None else [self.once]
        replies = talk(
            responder,
            questions,
            screen,
            show_competition=self.show_competition,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        for reply in replies:
            if out.json:
                out.record(dataclasses.asdict(reply))


@dataclass(frozen=True)
class Export:
    """Write a Hugging Face directory that transformers and vLLM load; of a LoRA run its adapter, which PEFT loads."""

    model: Positional[str]  # a run directory, or any other model
    out: Positional[str]  # a directory that is not there yet, or empty
    dtype: Literal["float32", "bfloat16"] = "float32"  # float32 keeps every bit
    merge_lora: bool = False  # of a LoRA run the whole model, its adapter added to the weights
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        from pkv.export import export

        folder = export(self.model, self.out, self.dtype, self.merge_lora)
        out.result(f"exported to {folder}", {"exported": str(folder)})


@dataclass(frozen=True)
class Report:
    """Write what happened in a run as one HTML file with charts and readable competitions."""

    run: Positional[str]  # a run directory
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        from pkv.report import write_report

        file = write_report(Path(self.run))
        out.result(f"written: {file}", {"report": str(file)})


@dataclass(frozen=True)
class Bench:
    """Measure sampling, the update, or a step of both on made-up data: speed, seconds, compilation, memory."""

    what: Positional[Literal["sample", "update", "step"]]  # step: sampling, then the update on what was sampled
    model: str  # a Hugging Face directory, a hub id, or a run directory
    prompts: int = 8  # random tokens, no text
    samples: int = 8  # responses to each prompt
    max_new_tokens: int = 1024  # of a response
    prompt_tokens: int = 140  # of a prompt
    runs: int = 3  # measured, after one that compiles
    init: Literal["pretrained", "random"] = "pretrained"  # random: of the model only config.json and the tokenizer
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: float32 on a CPU, bfloat16 elsewhere
    slots: int | None = None  # sample, step: rows that decode at the same time; 64 unless given
    segment: int | None = None  # sample, step: decode steps between two visits of the host; 32 unless given
    temperature: float | None = None  # sample, step: 1 unless given
    row_tokens: int | None = None  # update, step: of a packed row; what a response needs, in 256s, unless given
    micro_rows: int | None = None  # update, step: rows of one pass, in multiples of the devices; 4 unless given
    apart: bool = False  # update, step: every response is packed behind a prompt of its own
    remat: Literal["none", "cheap", "all", "offload"] | None = None  # update, step: see model.remat; none unless given
    moments: Literal["float32", "bfloat16", "float8"] | None = None  # update, step: see optimizer.moments; float32
    seed: int = 0
    json: bool = False  # JSON only on stdout, which it is anyway

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        for name in ("prompts", "samples", "max_new_tokens", "prompt_tokens", "runs"):
            at_least(name.replace("_", "-"), getattr(self, name))
        sampling = self._given("slots", "segment", "temperature")
        packing, model = self._given("row_tokens", "micro_rows"), self._given("remat")
        optimizer = self._given("moments")
        if self.apart and self.what == "sample":
            raise UserError("--apart: pkv bench sample has no use for it; leave it out")
        for name in {"sample": packing | model | optimizer, "update": sampling}.get(self.what, {}):
            raise UserError(f"--{name.replace('_', '-')}: pkv bench {self.what} has no use for it; leave it out")
        packing = {"row_tokens": -(-(self.prompt_tokens + self.max_new_tokens) // 256) * 256} | packing
        packing |= {"share_prompts": not self.apart}
        model |= {"path": self.model, "init": self.init}
        asked = {"seed": self.seed, "model": model, "optimizer": optimizer, "sampling": sampling, "grpo": packing}
        config = parse_config(asked)
        from pkv.bench import Task, bench, in_words
        from pkv.evaluate.policy import usual_dtype

        dtype = usual_dtype() if self.dtype == "auto" else self.dtype
        grpo = dataclasses.replace(config.grpo, prompts=self.prompts, samples=self.samples)
        config = dataclasses.replace(config, grpo=grpo, model=dataclasses.replace(config.model, dtype=dtype))
        result = bench(self.what, Task(config, self.prompt_tokens, self.max_new_tokens), self.runs)
        out.say(in_words(result))
        out.record(result)

    def _given(self, *names: str) -> dict[str, Any]:
        """The flags among `names` that the line holds."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Plan:
    """Will it fit: a run's real programs compiled for a slice that isn't here (needs pkv[tpu]); memory, time, money."""

    config: Positional[str]  # a YAML file, or a shipped config; flags such as --grpo.micro_rows 1 change what it says
    topology: str  # v5e:4x8, v5p:2x2x2, v6e:4x4, two slices as 2xv5e:4x8, or GPUs as h100:8 (by arithmetic)
    data: int | None = None  # the mesh's sizes; the config's unless given
    fsdp: int | None = None
    sequence: int | None = None
    tensor: int | None = None
    prompt_tokens: int | None = (
        None  # of the longest prompt; what grpo.row_tokens leaves beside a response unless given
    )
    search: bool = False  # try meshes and micro-batches, those that send the least first, until one fits
    prices: str | None = None  # a YAML file of dollars a chip and hour, such as `v5e: 1.20`
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> int:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        given = [f"--mesh.{name}={size}" for name, size in sizes.items() if size is not None]
        config = load_config(self.config, [*given, *flags])
        from pkv.plan import ADAPTERS, as_record, find, in_words, model_shape, quicker, read_slice, work_of

        wanted = read_slice(self.topology, Path(self.prices) if self.prices else None)
        work = work_of(config, model_shape(config.model.path, config.model.context), self.prompt_tokens)
        plan, changed = find(work, wanted, out.say, self.search)
        advice = f"\n{'With' if plan.fits else 'It would fit with'}: {' '.join(changed)}" if changed else ""
        if not (plan.fits or changed):
            advice = "\nNothing that was tried fits; take a larger slice, or a smaller model or row."
        if any(flag.startswith(ADAPTERS) for flag in changed):
            advice += "\nThat trains adapters and not the model: raise the rounds' learning_rate some ten times."
        faster = None
        if (better := quicker(plan)) is not None:
            flag, hours = better
            faster = {"settings": [flag], "hours": hours}
            advice += f"\nDecoding takes most of the time: by formulas some {hours:.1f} hours with {flag}"
        out.result(in_words(plan) + advice, as_record(plan) | {"settings": list(changed), "quicker": faster})
        return 0 if plan.fits else DOES_NOT_FIT


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: versions, devices, hosts, caches, disk; what is wrong, each with its remedy."""

    run: str = "runs"  # where runs are to lie
    online: bool = False  # ask the hub, too
    timeout: int = 60  # seconds in which JAX must have started
    json: bool = False  # JSON only on stdout

    def __call__(self, out: Output, flags: Sequence[str]) -> int:
        at_least("timeout", self.timeout)
        from pkv.doctor import diagnose, in_words

        findings = diagnose(Path(self.run), online=self.online, timeout_s=self.timeout)
        out.result(in_words(findings), [dataclasses.asdict(finding) for finding in findings])
        return int(any(finding.state == "fail" for finding in findings))


Command = Train | Eval | Sample | Score | Chat | Export | Report | Bench | Plan | Doctor
