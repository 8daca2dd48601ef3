"""The commands; nothing but parsing and calling. `pkv --help` and `pkv score` must start without jax."""

from pkv.cli.program import main

__all__ = ["main"]
