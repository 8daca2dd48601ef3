"""From prompts to scored groups: each rollout is taken apart and scored when it ends, while others are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from pkv.competition import Tokenizer, block_budget, render, stop_strings, together
from pkv.model import Params
from pkv.records import Group, Problem, Prompt, Rollout, Scorecard, Trace, Watch
from pkv.rewards import ScoringPool
from pkv.sampling import Completion, Engine, Request, row_keys
from pkv.tracking import Clock


@dataclass(frozen=True)
class Source:
    """Where rollouts come from: the engine, its weights (from `Engine.load`), the tokenizer, and the step they are for.

    stop: texts that end a response. fighter_tokens: a fighter's block is closed where it has so many; 0: never.
    policy_step: the step that the weights stand before, where it isn't `step`.
    """

    engine: Engine
    weights: Params
    tokenizer: Tokenizer
    step: int = 0
    stop: tuple[str, ...] = ()
    fighter_tokens: int = 0
    policy_step: int | None = None

    def watch(self) -> Callable[[], Watch] | None:
        """What makes the watch of each response; None when there is nothing to watch."""
        makers = [stop_strings(self.tokenizer, self.stop)] if self.stop else []
        if self.fighter_tokens:
            makers.append(block_budget(self.tokenizer, self.fighter_tokens))
        return together(*makers) if makers else None


def render_prompts(tokenizer: Tokenizer, problems: Sequence[Problem], system: str) -> list[Prompt]:
    """Problems as prompts, under one system prompt."""
    return [Prompt(problem, render(tokenizer, problem.question, system)) for problem in problems]


def requests_for(
    source: Source, prompts: Sequence[Prompt], samples: int, max_new_tokens: int, seed: int, purpose: str
) -> list[Request]:
    """What the engine is asked: `samples` of every prompt, keyed by seed, purpose, source.step, problem and sample."""
    keys = row_keys(seed, purpose, source.step, [prompt.problem.id for prompt in prompts], samples)
    watch = source.watch()
    return [Request(prompt.tokens, key, max_new_tokens, watch) for prompt, key in zip(prompts, keys, strict=True)]


@dataclass(frozen=True)
class Sampled:
    """Rollouts by prompt and sample, whose scores may still be on their way."""

    prompts: Sequence[Prompt]
    rollouts: Sequence[Sequence[Rollout]]
    scores: Sequence[Sequence[Future[tuple[Trace, Scorecard]]]]

    def scored(self, clock: Clock | None = None) -> list[Group]:
        """The groups in the order of the prompts, once all is scored. clock: told the seconds that this took."""
        groups = []
        with (clock or Clock())("score"):
            for prompt, rollouts, scores in zip(self.prompts, self.rollouts, self.scores, strict=True):
                traces, cards = zip(*(future.result() for future in scores), strict=True)
                groups.append(Group(prompt, tuple(rollouts), traces, cards))
        return groups


def sample_groups(
    source: Source,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    purpose: str,
    scoring: ScoringPool,
    on_rollout: Callable[[Rollout], None] | None = None,
    clock: Clock | None = None,
) -> Sampled:
    """`samples` rollouts of every prompt, each handed to the scoring when it ends.

    The draws depend on seed, purpose, source.step, problem and sample only. clock: told the seconds that sampling took.
    """
    requests = requests_for(source, prompts, samples, max_new_tokens, seed, purpose)
    step = source.step if source.policy_step is None else source.policy_step
    found: dict[tuple[int, int], tuple[Rollout, Future[tuple[Trace, Scorecard]]]] = {}
    with (clock or Clock())("sample"):
        for done in source.engine.sample(source.weights, requests):
            problem = prompts[done.request].problem
            rollout = _as_rollout(done, problem, step)
            found[done.request, done.sample] = rollout, submit(scoring, source.tokenizer, problem, rollout)
            if on_rollout is not None:
                on_rollout(rollout)
    members = [[found[number, sample] for sample in range(samples)] for number in range(len(prompts))]
    rollouts = [[rollout for rollout, _ in group] for group in members]
    return Sampled(prompts, rollouts, [[score for _, score in group] for group in members])


def submit(
    scoring: ScoringPool, tokenizer: Tokenizer, problem: Problem, rollout: Rollout
) -> Future[tuple[Trace, Scorecard]]:
    """Have a rollout taken apart and scored."""
    text, offsets = tokenizer.decode_with_offsets(rollout.tokens)
    return scoring.submit(problem, text, offsets, rollout.finish == "length", rollout.forced)


def _as_rollout(done: Completion, problem: Problem, step: int) -> Rollout:
    forced = done.forced if done.forced.any() else None
    return Rollout(problem.id, done.sample, done.tokens, done.logprobs, done.policy_logprobs, done.finish, step, forced)
