"""The rollout engine: token ids in, token ids and log-probabilities out. No text here."""

from pkv.sampling.engine import Completion, Engine, Request
from pkv.sampling.keys import row_keys

__all__ = ["Completion", "Engine", "Request", "row_keys"]
