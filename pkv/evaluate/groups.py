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
    """Where rollouts come from: the engine, its weights (from `Engine.load`), the tokenizer, and the policy's step.

    stop: texts that end a response. fighter_tokens: a fighter's block is closed where it has so many; 0: never.
    """

    engine: Engine
    weights: Params
    tokenizer: Tokenizer
    step: int = 0
    stop: tuple[str, ...] = ()
    fighter_tokens: int = 0

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


def collect_groups(
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
) -> list[Group]:
    """`samples` scored rollouts of every prompt, groups in the order of the prompts.

    The draws depend on seed, purpose, source.step, problem and sample only. clock: told the seconds that were spent on
    sampling, and those that only scoring took.
    """
    clock = clock or Clock()
    requests = requests_for(source, prompts, samples, max_new_tokens, seed, purpose)
    found: dict[tuple[int, int], tuple[Rollout, Future[tuple[Trace, Scorecard]]]] = {}
    with clock("sample"):
        for done in source.engine.sample(source.weights, requests):
            problem = prompts[done.request].problem
            rollout = _as_rollout(done, problem, source.step)
            text, offsets = source.tokenizer.decode_with_offsets(done.tokens)
            scored = scoring.submit(problem, text, offsets, done.finish == "length", rollout.forced)
            found[done.request, done.sample] = rollout, scored
            if on_rollout is not None:
                on_rollout(rollout)
    groups = []
    with clock("score"):
        for number, prompt in enumerate(prompts):
            members = [found[number, sample] for sample in range(samples)]
            traces, cards = zip(*(future.result() for _, future in members), strict=True)
            groups.append(Group(prompt, tuple(rollout for rollout, _ in members), traces, cards))
    return groups


def _as_rollout(done: Completion, problem: Problem, step: int) -> Rollout:
    forced = done.forced if done.forced.any() else None
    return Rollout(problem.id, done.sample, done.tokens, done.logprobs, done.policy_logprobs, done.finish, step, forced)
