"""The commands: parsing and calling, nothing else. `pkv --help` and `pkv score` must start without jax."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, Union

import tyro
from tyro.conf import Positional, subcommand

from pkv.config import Config, SamplingConfig, UserError, find_config, load_config, parse_config

if TYPE_CHECKING:
    import numpy as np

USER_ERROR, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Output:
    """Where a command's results go; with `--json` people's text goes to stderr, so that `results` holds JSON only."""

    results: TextIO
    json: bool

    def say(self, text: str) -> None:
        """Text for people."""
        print(text, file=sys.stderr if self.json else self.results, flush=True)

    def record(self, value: Any) -> None:
        """One line of JSON."""
        print(json.dumps(value, ensure_ascii=False), file=self.results, flush=True)

    def result(self, text: str, value: Any) -> None:
        """A result: as text, or as JSON."""
        if self.json:
            self.record(value)
        else:
            self.say(text)


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
        from pkv.train.loop import train
        from pkv.train.rounds import reward_budgets
        from pkv.train.summary import closing_summary

        out.say(reward_budgets(config))
        train(config, folder, self.fresh)
        out.say(closing_summary(folder))
        if out.json:
            lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
            out.record({"run": str(folder), "evaluations": [json.loads(line) for line in lines]})


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
        sampling = sampling_of(self.temperature)
        at_least("samples", self.samples)
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples}: at temperature 0 all are the same; give --temperature 1")
        from pkv.data import open_source

        problems = open_source(self.data, self.limit)
        from pkv.config import RewardConfig, RoundConfig
        from pkv.evaluate import evaluate, render_prompts
        from pkv.evaluate.answering import open_model
        from pkv.rewards import DEFAULT_WEIGHTS, ScoringPool
        from pkv.tracking import Progress

        with ScoringPool(DEFAULT_WEIGHTS, RoundConfig().length_optimum, RewardConfig()) as scoring:
            responder = open_model(self.model, sampling, self.system)
            prompts = render_prompts(responder.source.tokenizer, problems, responder.system)
            longest = max(len(prompt.tokens) for prompt in prompts)
            budget = responder.new_tokens(longest, self.max_new_tokens)
            with Progress(len(prompts) * self.samples, "eval") as progress:
                evaluation = evaluate(
                    responder.source_for(longest + budget),
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
        sampling = sampling_of(self.temperature, self.top_p, self.top_k, self.min_p, self.stop)
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
        sampling = dataclasses.replace(sampling_of(self.temperature), slots=1, segment=8)
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: float32 on a CPU, bfloat16 elsewhere
    slots: int | None = None  # sample, step: rows that decode at the same time; 64 unless given
    segment: int | None = None  # sample, step: decode steps between two visits of the host; 32 unless given
    temperature: float | None = None  # sample, step: 1 unless given
    row_tokens: int | None = None  # update, step: of a packed row; what a response needs, in 256s, unless given
    micro_rows: int | None = None  # update, step: rows of one pass, in multiples of the devices; 4 unless given
    apart: bool = False  # update, step: every response is packed behind a prompt of its own
    remat: Literal["none", "cheap", "all", "offload"] | None = None  # update, step: see model.remat; none unless given
    seed: int = 0
    json: bool = False  # JSON only on stdout, which it is anyway

    def __call__(self, out: Output, flags: Sequence[str]) -> None:
        for name in ("prompts", "samples", "max_new_tokens", "prompt_tokens", "runs"):
            at_least(name.replace("_", "-"), getattr(self, name))
        sampling = self._given("slots", "segment", "temperature")
        packing, model = self._given("row_tokens", "micro_rows"), self._given("remat")
        if self.apart and self.what == "sample":
            raise UserError("--apart: pkv bench sample has no use for it; leave it out")
        for name in {"sample": packing | model, "update": sampling}.get(self.what, {}):
            raise UserError(f"--{name.replace('_', '-')}: pkv bench {self.what} has no use for it; leave it out")
        packing = {"row_tokens": -(-(self.prompt_tokens + self.max_new_tokens) // 256) * 256} | packing
        packing |= {"share_prompts": not self.apart}
        asked = {"seed": self.seed, "model": {"path": self.model} | model, "sampling": sampling, "grpo": packing}
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


Command = Train | Eval | Sample | Score | Chat | Export | Report | Bench
_COMMANDS = tuple(Command.__args__)
_FORM = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 2 the user's mistake, 130 interrupted, 1 anything else."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing: pkv has no use for it
    try:
        if arguments == ["--version"]:
            import pkv

            print(pkv.__version__)
            return 0
        command, flags = parse(arguments)
        return execute(command, flags)
    except UserError as error:
        print(f"pkv: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        hint = "; the same command resumes at the last checkpoint" if arguments[:1] == ["train"] else ""
        print(f"\npkv: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read the results has enough, as in `pkv sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def execute(command: Command, flags: Sequence[str]) -> int:
    """Call a command, its results on stdout; whatever else prints is kept off it when it carries JSON."""
    out = Output(sys.stdout, command.json or isinstance(command, Sample | Score | Bench))
    with contextlib.redirect_stdout(sys.stderr) if out.json else contextlib.nullcontext():
        command(out, flags)
    return 0


def parse(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """The command of a line, and what `train` leaves to the config. Raises UserError; SystemExit after `--help`."""
    names = [kind.__name__.lower() for kind in _COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise UserError(f"{arguments[0]}: no such command; {hint}")
    choices: Any = Union[tuple(Annotated[kind, subcommand(kind.__name__.lower())] for kind in _COMMANDS)]  # noqa: UP007
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command, rest = tyro.cli(
                choices, prog="pkv", description=_ABOUT, args=arguments, config=_FORM, return_unknown_args=True
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{one_line(box.getvalue())}; see pkv {' '.join(arguments[:1])} --help") from None
    if rest and not isinstance(command, Train):
        known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command)]
        near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see pkv {type(command).__name__.lower()} --help"
        raise UserError(f"{rest[0]}: unknown argument; {hint}")
    return command, rest


_ABOUT = "Teaches a language model to answer by competition, with judge-assisted GRPO."


def one_line(box: str) -> str:
    """tyro's framed message as one line: no frame, no title, nothing below its rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)
    return " ".join(message).rstrip(".")


def sampling_of(
    temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, stop: Sequence[str] = ()
) -> SamplingConfig:
    """Checked sampling settings. Raises UserError."""
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": list(stop)}
    return parse_config({"sampling": asked}).sampling


def at_least(name: str, value: int, least: int = 1) -> None:
    """Raise UserError for a flag below its least value."""
    if value < least:
        raise UserError(f"--{name} {value}: expected at least {least}")


def offsets_of(config: Config | None) -> Callable[[str], np.ndarray] | None:
    """How the tokenizer of the config's model cuts a text, so that lengths are in tokens; None without a model."""
    if config is None or not config.model.path:
        return None
    from pkv.competition import Tokenizer, split_tokens

    tokenizer = Tokenizer.load(config.model.path, light=True)

    def offsets(text: str) -> np.ndarray:
        decoded, found = tokenizer.decode_with_offsets(tokenizer.encode(text))
        # A tokenizer that normalises has not the same characters: there words stand in for its tokens.
        return found if decoded == text else split_tokens(text)

    return offsets
