"""Megatron's forward and backward schedules, run the same way for student and teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.data.batching import MicroBatch, Sample, Side, micro_batches
from megatron_trd.parallel.grid import Grid

# hidden states `[s, b, hidden]` of a micro-batch on the last stage -> scalar loss
LossFunction = Callable[[MicroBatch, Tensor], Tensor]
KeepFunction = Callable[[MicroBatch, Tensor], Tensor]


def _batch_count(samples: int, size: int, grid: Grid) -> int:
    """Number of micro-batches for `samples` samples: at least one, and the same on all ranks that share experts, since
    they exchange tokens in every layer of every micro-batch. Collective where experts are shared.

    A copy consists of these ranks and those that share tensors with them.
    """
    count = max(1, -(-samples // size))
    if grid.layout.ep == 1:
        return count
    most = torch.tensor(count, device=platform.current().device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=grid.copy_group)
    return int(most)


def batches_of(
    samples: Sequence[Sample], mine: Sequence[int], side: Side, *, size: int, grid: Grid, split: bool
) -> list[MicroBatch]:
    """Micro-batches of at most `size` of a replica's samples; `split`: each tensor-parallel rank has a part of each
    sequence (sequence parallelism). Collective where experts are shared."""
    current = platform.current()
    multiple = math.lcm(grid.layout.tp if split else 1, current.length_multiple)
    count = _batch_count(len(mine), size, grid)
    return micro_batches(samples, mine, side, size=size, multiple=multiple, device=current.device, count=count)


def run_schedule(
    model: torch.nn.Module,
    grid: Grid,
    batches: Sequence[MicroBatch],
    loss: LossFunction | None = None,
    keep: KeepFunction = lambda _, hidden: hidden,
) -> list[Tensor]:
    """Run all micro-batches through the pipeline, with backward if a `loss` is given.

    Without `loss`, returns the result of `keep` for the hidden states of each micro-batch on the last stage, an empty
    list elsewhere. Losses of micro-batches are summed as they are: nothing is divided by the number of micro-batches or
    replicas.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_no_pipelining,
        forward_backward_pipelining_without_interleaving,
    )
    from megatron.core.utils import get_model_config

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output = model(batch.tokens, batch.positions, None)  # no mask: causal attention, padding is at the end

        def finish(hidden: Tensor, non_loss_data: bool = False) -> Any:
            if loss is None:
                return keep(batch, hidden.detach())
            value = loss(batch, hidden)
            # The count makes megatron-core leave the loss undivided; token weights hold the normalisation.
            return value, torch.ones([], dtype=torch.int, device=value.device), value.detach()

        return output, finish

    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": iter(batches),
        "model": model,
        "num_microbatches": len(batches),
        "seq_length": batches[0].tokens.shape[1],
        "micro_batch_size": batches[0].tokens.shape[0],
        "forward_only": loss is None,
        "collect_non_loss_data": loss is None,
        "pg_collection": grid.groups,
    }
    with platform.current().megatron(), torch.set_grad_enabled(loss is not None):
        if grid.layout.pp == 1:
            return forward_backward_no_pipelining(**arguments)
        communicator = P2PCommunicator(pp_group=grid.groups.pp, config=get_model_config(model))
        return forward_backward_pipelining_without_interleaving(p2p_communicator=communicator, **arguments)
