"""From a trace to its scorecard: what a response earns, by whom, and why. Plain Python on the host, no jax."""

from pkv.rewards.pool import ScoringPool
from pkv.rewards.score_file import score_lines
from pkv.rewards.scoring import Scorer, budget, load_user_files, load_user_rewards, resolve_weights
from pkv.rewards.table import DEFAULT_WEIGHTS, FAMILIES, RULES

__all__ = [
    "DEFAULT_WEIGHTS",
    "FAMILIES",
    "RULES",
    "Scorer",
    "ScoringPool",
    "budget",
    "load_user_files",
    "load_user_rewards",
    "resolve_weights",
    "score_lines",
]
