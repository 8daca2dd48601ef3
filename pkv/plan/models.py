"""What a config's model is made of, without its weights and, for the models that configs name, without a network."""

from __future__ import annotations

from pathlib import Path

import yaml

from pkv.evaluate import RUN_MODEL
from pkv.model import Arch, read_arch, stretched
from pkv.model.families import family_of

TABLE = Path(__file__).with_name("released.yaml")
ALIKE = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}


def model_shape(source: str, context: int = 0) -> Arch:
    """The Arch of a directory, a run, or a hub id, for `context` positions. Raises UserError as `read_arch` does."""
    if (Path(source) / "checkpoints").is_dir():
        return read_arch(Path(source) / RUN_MODEL)  # which holds as many positions as the run was stretched to
    if Path(source).is_dir():
        return read_arch(source, context)
    known = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    if source in known:
        config = stretched(ALIKE | known[source], context)
        return family_of(config).read(config)
    return read_arch(source, context)
