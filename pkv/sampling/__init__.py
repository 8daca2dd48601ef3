"""The rollout engine: token ids in, token ids and log-probabilities out. No text here."""

from pkv.sampling.engine import Engine
from pkv.sampling.keys import row_keys
from pkv.sampling.programs import device_bytes
from pkv.sampling.rehearsal import WarmUp, rehearse
from pkv.sampling.schedule import Completion, Request

__all__ = ["Completion", "Engine", "Request", "WarmUp", "device_bytes", "rehearse", "row_keys"]
