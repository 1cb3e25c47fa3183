"""Output-head products in chunks: matrix products into given buffers, whatever the dtype of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_trd.losses.torch_kernels import blocks

# Logits of one chunk and one side. Larger chunks give longer products: these hold 512 tokens of 151,936 columns on a
# CPU and a thousand on a GPU, enough for the products that give logits to run at full speed.
HOST_CHUNK_BYTES = 320 * 2**20
ACCELERATOR_CHUNK_BYTES = 640 * 2**20
# Chunks whose gradients are collected in 16 bits, in half the memory of both sides' logits, and multiplied together:
# each product with hidden states reads and writes the head's whole float32 gradient. On an H100 it takes 1.4 times as
# long as the multiplication alone with a thousand tokens, 1.15 times with two thousand (docs/results.md).
CHUNKS_A_PRODUCT = 2
ROW_MULTIPLE = 128  # default chunks on a GPU are multiples of this many tokens, the tiles of its matrix kernels


def budget_tokens(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of tokens in a chunk whose logits, of `width` columns each, fit the budget of a device."""
    budget = ACCELERATOR_CHUNK_BYTES if device.type == "cuda" else HOST_CHUNK_BYTES
    return max(1, budget // max(1, width * dtype.itemsize))


def chunks(
    tokens: int, width: int, chunk_tokens: int | None, dtype: torch.dtype, device: torch.device, *, under_way: int = 1
) -> list[slice]:
    """Cut `tokens` into slices, equal except for the last. Any `under_way` consecutive ones have at most `chunk_tokens`
    tokens (None: `budget_tokens`, on a GPU in whole tiles), plus a few for rounding.

    `width` is the padded width of a shard, so that all ranks cut identically.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1 (None: from the memory budget), not {chunk_tokens}")
    most = max(1, (chunk_tokens or budget_tokens(width, dtype, device)) // under_way)
    tiles = chunk_tokens is None and device.type == "cuda" and most >= ROW_MULTIPLE
    multiple = ROW_MULTIPLE if tiles else 1
    most -= most % multiple
    step = math.ceil(tokens / max(1, math.ceil(tokens / most)) / multiple) * multiple
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, max(1, step))]


def chunks_under_way(ranks: int) -> int:
    """Chunks in flight in the fused loss: with several ranks two, so that one computes while the other communicates."""
    return 1 if ranks == 1 else 2


def waiting_tokens(
    tokens: int, chunk: int, head: torch.dtype, sums: torch.dtype, device: torch.device, *, under_way: int = 1
) -> int:
    """How many of `tokens` have their logits' gradients collected for one product; 0: each chunk has its own.

    `chunk` is the number of tokens in a chunk; `under_way` chunks together hold what `chunk_tokens` allows.

    They can be collected if they are not in the logits' memory: a GPU's products take them in the dtype of a `head`
    that is narrower than `sums`.
    """
    return min(tokens, CHUNKS_A_PRODUCT * under_way * chunk) if device.type == "cuda" and head != sums else 0


def product_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Write `left @ right` into `out`, summed and stored in its dtype, the widest of the three.

    Logits rounded to bf16 say little about the difference between a student and a teacher close to it: at 0.003 nats
    per token the gradient is 39 % off (benchmarks/results/loss_near.md).
    """
    if left.dtype == right.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if out.is_cuda and out.dtype == torch.float32:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    # A CPU has no mixed-precision product, and no device has one that sums in float64: the weight, the long side of
    # `right`, is widened a few rows at a time.
    left, (inner, columns) = left.to(out.dtype), right.shape
    if columns > inner:
        for here in blocks(columns, inner * out.element_size(), out.device):
            torch.mm(left, right[:, here].to(out.dtype), out=out[:, here])
    else:
        for here in blocks(inner, columns * out.element_size(), out.device):
            add_product(out, left[:, here], right[here], first=here.start == 0)
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> Tensor:
    """`out += left @ right`, summed in the dtype of `out`, which is at least as wide as that of `right`.

    The `first` product overwrites `out`.
    """
    kept = 0 if first else 1
    if out.is_cuda and right.dtype != out.dtype == torch.float32:
        return torch.addmm(out, left, right, beta=kept, out_dtype=out.dtype, out=out)
    return out.addmm_(left, right.to(out.dtype), beta=kept)
