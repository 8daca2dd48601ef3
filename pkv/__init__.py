"""pkv teaches a language model to answer by competition, with judge-assisted GRPO, in JAX.

The names below are loaded when they are first used, so that `import pkv` takes no time and needs no accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkv.config import Config, UserError, load_config
    from pkv.evaluate.answering import sample
    from pkv.plan.planning import plan
    from pkv.report import write_report
    from pkv.rewards import score_lines as score
    from pkv.train.loop import train

    __version__: str

__all__ = ["Config", "UserError", "__version__", "load_config", "plan", "sample", "score", "train", "write_report"]

_PLACES = {
    "Config": ("pkv.config", "Config"),
    "UserError": ("pkv.config", "UserError"),
    "load_config": ("pkv.config", "load_config"),
    "plan": ("pkv.plan", ""),  # the room itself, likewise
    "sample": ("pkv.evaluate.answering", "sample"),
    "score": ("pkv.rewards", "score_lines"),
    "train": ("pkv.train", ""),  # the room itself, which can be called: see pkv/train/__init__.py
    "write_report": ("pkv.report", "write_report"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pkv")
        except PackageNotFoundError:
            return "0+not.installed"
    if name not in _PLACES:
        raise AttributeError(f"module 'pkv' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    room = importlib.import_module(module)
    return getattr(room, attribute) if attribute else room


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
