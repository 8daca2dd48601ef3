"""The decoder: weights, forward, cache, and checkpoints in and out. The only room that knows Flax and safetensors.

Outside, a model is an `Arch` (what it is made of) and a nested dict of arrays (its weights).
"""

from pkv.model.arch import Arch
from pkv.model.cache import Cache, init_cache
from pkv.model.decoder import forward, head, logits
from pkv.model.export import save_params
from pkv.model.kernels import SEGMENTS, Kernel, choose_kernel, choose_page_kernel
from pkv.model.linear import BLOCK, cast
from pkv.model.load import load_params, read_arch, read_config, stretched
from pkv.model.lora import freezer, init_adapters, join, split, weight_axes
from pkv.model.pages import (
    Level,
    Paged,
    Stock,
    cut_into_pages,
    init_stock,
    put_pages,
    resize_pages,
    stock_axes,
    stock_pages,
    take_pages,
)
from pkv.model.peft import save_adapter
from pkv.model.unstacked import lay_by_output, tied_scores, unstack_layers
from pkv.model.weights import Params, init_params, param_axes, param_shapes

__all__ = [
    "BLOCK",
    "SEGMENTS",
    "Arch",
    "Cache",
    "Kernel",
    "Level",
    "Paged",
    "Params",
    "Stock",
    "cast",
    "choose_kernel",
    "choose_page_kernel",
    "cut_into_pages",
    "forward",
    "freezer",
    "head",
    "init_adapters",
    "init_cache",
    "init_params",
    "init_stock",
    "join",
    "lay_by_output",
    "load_params",
    "logits",
    "param_axes",
    "param_shapes",
    "put_pages",
    "read_arch",
    "read_config",
    "resize_pages",
    "save_adapter",
    "save_params",
    "split",
    "stock_axes",
    "stock_pages",
    "stretched",
    "take_pages",
    "tied_scores",
    "unstack_layers",
    "weight_axes",
]
