"""Log-probabilities of given tokens under a vocabulary-sharded output head."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.losses.head import chunks, product_into
from megatron_trd.losses.rows import log_scales
from megatron_trd.losses.shard import VocabShard, statistics_dtype
from megatron_trd.losses.torch_kernels import row_blocks, shift_


@torch.no_grad()
def vocab_parallel_log_prob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log p of `token_ids`, without a gradient and without ever holding the logits of more than a chunk.

    Args:
        hidden: `[tokens, hidden]`, the same on every rank of `group`.
        weight: `[V / p, hidden]`, this rank's rows of the output head, in rank order.
        token_ids: `[tokens]`, integers. An id outside the vocabulary has log-probability -inf.
        group, temperature, vocab_size, chunk_tokens: as in `fused_linear_divergence`.

    Returns:
        `[tokens]`, float32 (float64 if `hidden` is), the same on every rank.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    shard = VocabShard.of(group, weight.shape[0], vocab_size)
    dtype = statistics_dtype(hidden)
    result = hidden.new_empty(hidden.shape[0], dtype=dtype)
    for here in chunks(hidden.shape[0], weight.shape[0], chunk_tokens, dtype, hidden.device):
        logits = result.new_empty(here.stop - here.start, shard.columns)
        product_into(logits, hidden[here], weight[: shard.columns].t())
        sums = shard.start_gather(_local_sums_(logits.div_(temperature), token_ids[here] - shard.start)).wait()
        maximum, total, chosen = sums.unbind(dim=1)  # [ranks, rows] each
        result[here] = (chosen + log_scales(maximum, total)).amax(dim=0)
        del logits  # otherwise they would still be allocated when the next chunk's are made
    return result


def _local_sums_(logits: Tensor, columns: Tensor) -> Tensor:
    """`[3, rows]`: maximum, sum of shifted exponentials, shifted logit of the chosen column (-inf if not here)."""
    sums = logits.new_zeros(3, logits.shape[0])
    sums[2] = -torch.inf
    if logits.shape[1] > 0:
        here = (columns >= 0) & (columns < logits.shape[1])
        chosen = logits.gather(1, columns.where(here, 0)[:, None]).squeeze(1)
        sums[2] = chosen.where(here, -torch.inf)
    for rows in row_blocks(logits):
        sums[0, rows] = shift_(logits[rows])
        sums[1, rows] = logits[rows].exp_().sum(dim=1)
    sums[2] -= sums[0]
    return sums
