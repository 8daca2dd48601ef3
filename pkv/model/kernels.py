"""Attention by one platform's own kernel: of whole rows splash on TPU and cuDNN on GPU, of pages one for GPUs.

The first two compute what `attend` computes (attention.py), and keep no scores: memory grows with T, not with T². The
third, in page_kernel.py, computes what XLA does in pages.py.
"""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # what jax.nn calls, which hides where segments begin
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh

from pkv.config import UserError
from pkv.mesh import over_shards
from pkv.model.arch import Arch

Kernel = Literal["xla", "splash", "cudnn", "cudnn_masked"]  # masked: of packed rows, before Hopper
PageKernel = Literal["xla", "triton"]

LANES = 128  # a TPU's vectors: heads and rows are padded to multiples of this
BLOCK = 512  # queries and keys that meet in a TPU core's own memory at the same time, at most
PAGE_BYTES = 2**15  # of a head's keys or values, which our own kernel holds in registers: more was never tried
CUDNN_HEAD = 128  # cuDNN's largest head, which must be a multiple of 8 too
# Of a row for cuDNN, padding among them: what it computes beside the products grows with the places that it is told of.
SEGMENTS = 4, 16, 64


def choose_kernel(wanted: Literal["auto", "xla", "splash", "cudnn"], mesh: Mesh, arch: Arch, dtype: Any) -> Kernel:
    """The kernel for rows on a mesh; "auto" is splash on TPU, cuDNN on a GPU that has it and for a model that it knows,
    and else XLA. Raises UserError for one that can't be."""
    device = mesh.devices.flat[0]
    platform = device.platform
    capability = cuda_capability(device)
    lacks = {
        "dtype bfloat16": jnp.dtype(dtype) == jnp.bfloat16,
        f"heads of at most {CUDNN_HEAD}, in eighths": arch.head_size <= CUDNN_HEAD and arch.head_size % 8 == 0,
        "scores without a cap": arch.attention_cap is None,
        "layers of one kind": len(set(arch.local_layers)) < 2,
        "a GPU of compute capability 8 or more": capability >= 8,
    }
    missing = [need for need, there in lacks.items() if not there]
    if wanted == "auto":
        wanted = "splash" if platform == "tpu" else "cudnn" if platform == "gpu" and not missing else "xla"
    needed = {"xla": platform, "splash": "tpu", "cudnn": "gpu"}[wanted]
    if platform != needed:
        raise UserError(f"model.attention: {wanted} runs on {needed} only, and this is {platform}; use auto")
    if wanted == "cudnn" and missing:
        raise UserError(f"model.attention: cudnn needs {missing[0]}; use auto")
    return "cudnn_masked" if wanted == "cudnn" and capability < 9 else wanted


def choose_page_kernel(
    wanted: Literal["auto", "xla", "triton"], mesh: Mesh, arch: Arch, page: int, dtype: Any, eight_bit: bool
) -> PageKernel:
    """The kernel for pages of so many positions; "auto" is Triton on a GPU where it can be, and else XLA. Raises
    UserError for one that can't be."""
    sizes = (arch.head_size, page)
    bytes_of_a_head = arch.head_size * page * jnp.dtype(dtype).itemsize
    lacks = {
        "a GPU of compute capability 8 or more": cuda_capability(mesh.devices.flat[0]) >= 8,
        "a JAX with Pallas for Triton": find_spec("jax.experimental.pallas.triton") is not None,
        "mesh.tensor 1": mesh.shape["tensor"] == 1,
        "heads and pages of 16 or a higher power of two": all(s >= 16 and s.bit_count() == 1 for s in sizes),
        f"pages of at most {PAGE_BYTES // 1024} KiB a head": bytes_of_a_head <= PAGE_BYTES,
        "sampling.kv_cache plain": not eight_bit,
    }
    missing = [need for need, there in lacks.items() if not there]
    if wanted == "triton" and missing:
        raise UserError(f"sampling.attention: triton needs {missing[0]}; use auto")
    return "xla" if wanted == "xla" or missing else "triton"


def cuda_capability(device: Any) -> float:
    """9.0 for Hopper, and so on; 0 of what is no GPU of NVIDIA's."""
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found and device.platform == "gpu" else 0.0


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    local: bool | jax.Array,
    cap: float | None,
) -> jax.Array:
    """`attend` for rows by JAX's splash kernel (arXiv 2205.14135 on TPU), [B, T, N, H]; each device has its own heads.

    The arguments are `attend`'s, keys and values with T second. A traced `local` chooses between two kernels.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    rows, width = -T % LANES, -H % LANES
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, width))).swapaxes(1, 2) for x in (q_BTNH * scale, k_BTKH, v_BTKH)
    )
    # Padding at a row's end is later than every query, so that no query sees it: any segment will do.
    segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32) if segments_BT is None else segments_BT
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, rows)))

    def by_kind(*arrays: jax.Array) -> jax.Array:
        everywhere, nearby = (partial(_splash, window=size, cap=cap) for size in (None, window))
        if window is None or isinstance(local, bool):
            return (nearby if local else everywhere)(*arrays)
        return jax.lax.cond(local, nearby, everywhere, *arrays)

    heads = ("rows", "row_heads", "time", "head")
    own = over_shards(by_kind, (heads, heads, heads, ("rows", "time")))
    mixed_BNTH = own(q_BNTH, k_BKTH, v_BKTH, segments_BT)
    return mixed_BNTH.swapaxes(1, 2)[:, :T, :, :H]


def _splash(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    N, T = q_BNTH.shape[1:3]
    size = max(block for block in (LANES, 2 * LANES, BLOCK) if T % block == 0)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), size
    )
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**sizes, block_q_dq=size, block_kv_dq=size),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=MIXED,
    )
    segments = splash.SegmentIds(segments_BT, segments_BT)
    return cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments))  # residuals would come with it if asked


MIXED = "mixed"  # what a kernel's backward pass needs of its forward: the name by which rematerialisation may keep it


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    most_segments: int,
    masked: bool,
) -> jax.Array:
    """`attend` for rows by cuDNN's fused attention, [B, T, N, H]; each device has its own heads.

    A row's segments lie one behind the other, at most `most_segments` with its padding: cuDNN is told where each
    begins, and computes nothing between two. masked: it is given a mask of T² instead, as before Hopper it must.
    """
    heads = ("rows", "time", "row_heads", "head")
    kind = {"scale": scale, "window": window}
    own = partial(_cudnn_masked, **kind) if masked else partial(_cudnn, most_segments=most_segments, **kind)
    segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32) if segments_BT is None else segments_BT
    return over_shards(own, (heads, heads, heads, ("rows", "time")))(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None,
    most_segments: int,
) -> jax.Array:
    starts_BM, lengths_BM = places_of(segments_BT, most_segments)
    starts = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    mixed = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        sliding_window_length=window,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    return cast(jax.Array, mixed)  # residuals would come with it if asked


def _cudnn_masked(
    q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array, *, scale: float, window: int | None
) -> jax.Array:
    # With a mask cuDNN's backward pass knows even lengths only. What is added comes after every query: none sees it.
    T = q.shape[1]
    q, k, v, segments_BT = (jnp.pad(x, ((0, 0), (0, T % 2), *((0, 0),) * (x.ndim - 2))) for x in (q, k, v, segments_BT))
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=(segments_BT[:, :, None] == segments_BT[:, None, :])[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed[:, :T]


def places_of(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where each of a row's segments begins, and its length, int32 [B, M] both, M = `most`; -1 where there is none."""
    B, T = segments_BT.shape
    begins_BT = jnp.concatenate([jnp.ones((B, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    first = jax.vmap(partial(jnp.nonzero, size=most, fill_value=T))
    starts_BM = first(begins_BT)[0].astype(jnp.int32)
    lengths_BM = jnp.diff(starts_BM, axis=1, append=jnp.full((B, 1), T, jnp.int32))
    there_BM = starts_BM < T
    return jnp.where(there_BM, starts_BM, -1), jnp.where(there_BM, lengths_BM, -1)
