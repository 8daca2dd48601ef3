"""Advantages, packing, losses and the sharded update: tokens and numbers in, new weights out. No text here."""

from pkv.grpo.advantages import advantages_by_reward, token_advantages
from pkv.grpo.packing import Sequence, pack
from pkv.grpo.update import Learner, TrainState

__all__ = ["Learner", "Sequence", "TrainState", "advantages_by_reward", "pack", "token_advantages"]
