"""What is wrong with this machine, each with its remedy. No jax here: it may be what is broken."""

from pkv.doctor.diagnosis import diagnose
from pkv.doctor.findings import Finding, in_words

__all__ = ["Finding", "diagnose", "in_words"]
