"""Training: the loop, the curriculum, the supervised start, and what a run leaves on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkv.config import Config
    from pkv.train.run import Run


class _Room(ModuleType):
    """This package, which can be called: `pkv.train(config, folder)` and `pkv.train.loop` share one name."""

    def __call__(self, config: Config, folder: Path, fresh: bool = False) -> Run:
        from pkv.train.loop import train

        return train(config, folder, fresh)


sys.modules[__name__].__class__ = _Room
