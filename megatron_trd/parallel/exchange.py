"""Sends teacher hidden states from the teacher's last stage to the student's last stage.

`[response tokens, hidden_T]` of one sample takes 8-10 KB per token; its logits over a 151,936-token vocabulary would be
304 KB in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.parallel.grid import Layout


@dataclass(frozen=True)
class Route:
    """Where one sample's hidden states are computed and where they are needed."""

    sample: int
    tokens: int  # response tokens
    teacher_dp: int
    student_dp: int


def exchange_hidden(
    routes: Sequence[Route],
    local: Mapping[int, Tensor],
    teacher: Layout,
    student: Layout,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, Tensor]:
    """Send each sample's `[tokens, hidden_T]` to every rank of its student replica's last stage.

    `routes` is the same list on every rank; `local` holds the samples whose teacher replica this rank is the sender of
    (first tensor-parallel rank of the last stage). Returns sample -> hidden states for the samples this rank needs;
    empty off the student's last stage.
    """
    rank = dist.get_rank()
    received: dict[int, Tensor] = {}
    operations: list[dist.P2POp] = []
    for route in routes:
        source = teacher.last_stage(route.teacher_dp)[0]
        for target in student.last_stage(route.student_dp):
            if source == target == rank:
                received[route.sample] = local[route.sample]
            elif rank == source:
                operations.append(dist.P2POp(dist.isend, local[route.sample].contiguous(), target))
            elif rank == target:
                buffer = torch.empty(route.tokens, hidden_size, dtype=dtype, device=device)
                received[route.sample] = buffer
                operations.append(dist.P2POp(dist.irecv, buffer, source))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received
