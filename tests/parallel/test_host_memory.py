"""Memory that ranks of one machine share, and the barrier in it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_trd import host_memory
from tests.distributed import run_ranks

ROUNDS = 300


def count_together(rank: int, world: int) -> list[int]:
    """Rank function: rounds after whose barrier somebody's number of the round was not there."""
    shared = host_memory.share(8 * world, dist.group.WORLD)
    assert shared is not None
    numbers = shared.bytes.view(torch.int64)
    assert numbers.tolist() == [0] * world
    shared.barrier()
    late = []
    for turn in range(1, ROUNDS + 1):
        numbers[rank] = turn
        shared.barrier()
        if numbers.tolist() != [turn] * world:
            late.append(turn)
        shared.barrier()
    return late


def test_what_is_written_before_the_barrier_is_seen_after_it() -> None:
    assert run_ranks(count_together, 3) == [[]] * 3
