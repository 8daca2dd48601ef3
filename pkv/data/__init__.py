"""Problems from anywhere: generators, files and hub datasets, all as `Problem`. No jax, no scoring."""

from pkv.data.sources import open_source

__all__ = ["open_source"]
