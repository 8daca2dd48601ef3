"""The rollout engine: token ids in, token ids and log-probabilities out. No text here."""

from pkv.sampling.engine import Engine, common_beginning
from pkv.sampling.keys import row_keys
from pkv.sampling.programs import device_bytes
from pkv.sampling.rehearsal import WarmUp, compile_ahead, rehearse
from pkv.sampling.schedule import Completion, Request

__all__ = [
    "Completion",
    "Engine",
    "Request",
    "WarmUp",
    "common_beginning",
    "compile_ahead",
    "device_bytes",
    "rehearse",
    "row_keys",
]
