"""From a trace to its scorecard: every reward, always; a failed one is unscored, never a silent 0.

One of the two borders at which any exception is caught: a reward's call. Nothing here decides what a reward is worth.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pkv.config import RewardConfig, UserError
from pkv.mathcheck import VerifyError, VerifyPool, is_right
from pkv.records import BLOCKS, FIGHTERS, REWARD_OWNERS, Problem, Reward, Scorecard, Trace
from pkv.rewards import judge
from pkv.rewards.context import Context
from pkv.rewards.originality import overlap
from pkv.rewards.table import FAMILIES, RULES

UserReward = Callable[[Problem, Trace], float | None]
PAIRS = (("knight", "pirate"), ("viking", "pirate"), ("viking", "knight"))


class Scorer:
    """Scores traces of one round. Holds a pool of checking processes: close it, or use it as a context manager.

    weights: by reward or family (see `resolve_weights`). length_optimum: a fighter's tokens that earn the most. Raises
    UserError for an unknown weight or a user's file that can't be used.
    """

    def __init__(self, weights: Mapping[str, float], length_optimum: int, config: RewardConfig | None = None) -> None:
        config = config or RewardConfig()
        self._timeout_s = config.timeout_s
        self._length_optimum = length_optimum
        self._user = load_user_files(config.user_files)
        self.weights = resolve_weights(weights, tuple(self._user))
        self._pool = VerifyPool(workers=1, timeout_s=config.timeout_s)

    def score(self, problem: Problem, trace: Trace) -> Scorecard:
        """Every reward of a trace, those without a weight too, and the facts worth reading beside them."""
        context = Context(problem, trace, self._length_optimum, partial(is_right, pool=self._pool))
        rewards = {name: _call(name, rule.owner, partial(rule.measure, context)) for name, rule in RULES.items()}
        for name, (owner, function) in self._user.items():
            rewards[name] = _call(name, owner, partial(function, problem, trace), self._timeout_s)
        total = sum(self.weights[name] * reward.value for name, reward in rewards.items() if reward.value is not None)
        return Scorecard(rewards, total, context.answer("answer").value, _find_facts(context))

    def close(self) -> None:
        """End the checking processes."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _call(name: str, owner: str, measure: Callable[[], float | None], timeout_s: float | None = None) -> Reward:
    """One reward's call. pkv's own are linear, and check answers in killable processes: they need no alarm."""
    try:
        if timeout_s is None:
            value = measure()
        else:
            with _alarm(timeout_s):
                value = measure()
        if value is None:
            return Reward(name, None, owner, "absent")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number, got {value!r}")
        return Reward(name, number, owner)
    except VerifyError as error:
        return Reward(name, None, owner, "unscored", f"{error.code}: {error}")
    except _TimeUp:
        return Reward(name, None, owner, "unscored", f"timeout: took more than {timeout_s:g} s")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the border: whatever a reward raises makes it unscored
        return Reward(name, None, owner, "unscored", f"{type(error).__name__}: {error}")


class _TimeUp(BaseException):
    """Not an Exception, so that a reward's own `except Exception` can't swallow it."""


@contextmanager
def _alarm(timeout_s: float) -> Iterator[None]:
    """Interrupt what runs longer; off the main thread, where there are no signals, it is found out afterwards."""
    began = time.monotonic()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):

        def ring(number: int, frame: FrameType | None) -> None:
            raise _TimeUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    else:
        yield
    if time.monotonic() - began > timeout_s:
        raise _TimeUp


def _find_facts(context: Context) -> dict[str, Any]:
    facts: dict[str, Any] = {"extraction": context.answer("answer").code}
    for name in FIGHTERS:
        facts[f"answer/{name}"] = context.answer(name).value
        try:
            facts[f"right/{name}"] = context.is_right(name)
        except VerifyError:
            facts[f"right/{name}"] = None
    for first, second in PAIRS:
        facts[f"overlap/{first}_{second}"] = overlap(first, second, context)
    for name in BLOCKS:
        block = context.trace.blocks.get(name)
        facts[f"length/{name}"] = block.tokens.size if block else 0
    return facts | judge.measure(context)


def resolve_weights(weights: Mapping[str, float], user: Sequence[str] = (), path: str = "weights") -> dict[str, float]:
    """The weight of every reward, 0 where none is given: a family sets its members, a reward's own name overrides.

    user: names of the user's own rewards. path: what the config calls these weights. Raises UserError for an unknown
    name or a weight that is no finite number.
    """
    known = (*RULES, *user)
    for name, weight in weights.items():
        if name not in known and name not in FAMILIES:
            near = difflib.get_close_matches(name, [*known, *FAMILIES], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join([*FAMILIES, *known])}"
            raise UserError(f"{path}: unknown reward {name!r}; {hint}")
        if not math.isfinite(weight):
            raise UserError(f"{path}.{name}: expected a finite number, got {weight!r}")
    resolved = dict.fromkeys(known, 0.0)
    for family, members in FAMILIES.items():
        if family in weights:
            resolved.update(dict.fromkeys(members, float(weights[family])))
    return resolved | {name: float(weight) for name, weight in weights.items() if name in known}


def budget(weights: Mapping[str, float], user: Sequence[str] = ()) -> str:
    """What a trace can earn by each family, in lines for people; a warning where being right doesn't outweigh the rest.

    Being right is worth the step from a wrong answer to a right one; the rest, all that the others can swing together.
    """
    resolved = resolve_weights(weights, user)
    lines = ["family                    least    most"]
    rest = 0.0
    for family, members in FAMILIES.items():
        ends = [sorted((resolved[name] * RULES[name].low, resolved[name] * RULES[name].high)) for name in members]
        lines.append(f"{family:<22}{sum(low for low, _ in ends):>9.2f}{sum(high for _, high in ends):>8.2f}")
        rest += sum(high - low for name, (low, high) in zip(members, ends, strict=True) if name != "correctness")
    lines += [f"{name:<22}  weight {resolved[name]:g}, range its own" for name in user]
    right = resolved["correctness"]
    verdict = f"a right answer is worth {right:g}, everything else together {rest:g}"
    lines.append(verdict if right > rest else f"warning: {verdict}: being right doesn't outweigh the rest")
    return "\n".join(lines)


def load_user_files(paths: Sequence[str]) -> dict[str, tuple[str, UserReward]]:
    """The user's own rewards out of all files. Raises UserError, for a name that stands in two of them too."""
    found: dict[str, tuple[str, UserReward]] = {}
    for path in paths:
        for name, reward in load_user_rewards(path).items():
            if name in found:
                raise UserError(f"{path}: reward {name!r} is in another user file already; give it its own name")
            found[name] = reward
    return found


def load_user_rewards(path: str | Path) -> dict[str, tuple[str, UserReward]]:
    """Run a user's Python file and take `rewards() -> {name: (owner, function)}` from it. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; rewards.user_files names Python files with `rewards()`")
    spec = importlib.util.spec_from_file_location(f"pkv_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.rewards()
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: rewards() must return {{name: (owner, function)}}, got {type(found).__name__}")
    for name, reward in found.items():
        if not isinstance(name, str) or name in RULES or name in FAMILIES:
            raise UserError(f"{path}: {name!r} can't be a reward's name: it must be text, and none of pkv's own")
        if not (isinstance(reward, tuple) and len(reward) == 2 and callable(reward[1])):
            raise UserError(f"{path}: {name}: expected (owner, function), got {reward!r}")
        if reward[0] not in REWARD_OWNERS:
            near = difflib.get_close_matches(str(reward[0]), REWARD_OWNERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(REWARD_OWNERS)}"
            raise UserError(f"{path}: {name}: no owner {reward[0]!r}; {hint}")
    return found
