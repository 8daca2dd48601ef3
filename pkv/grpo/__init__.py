"""Advantages, packing, losses and the sharded update: tokens and numbers in, new weights out. No text here."""

from pkv.grpo.advantages import advantages_by_reward, token_advantages
from pkv.grpo.optimizer import learning_rate
from pkv.grpo.packing import Layout, Sequence, pack
from pkv.grpo.update import Learner, TrainState, reference_weights

__all__ = [
    "Layout",
    "Learner",
    "Sequence",
    "TrainState",
    "advantages_by_reward",
    "learning_rate",
    "pack",
    "reference_weights",
    "token_advantages",
]
