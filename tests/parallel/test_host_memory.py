"""Tensors that ranks of one machine see of each other, and the barrier around looking at them."""

from __future__ import annotations

import random
import resource
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_trd import host_memory
from tests.distributed import run_ranks

ROUNDS = 300


def named(rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A storage, and what a rank shows: two views of it, one with strides, and a tensor of another type."""
    flat = torch.zeros(100_000)
    views = {"head": flat[:12].view(3, 4), "body": flat[12:36].view(4, 6).t(), f"rank {rank}": torch.tensor([rank])}
    return flat, views


def look(rank: int, world: int) -> dict[str, Any]:
    """Rank function: rounds in which somebody's number was not seen after the barrier, and what else was to hold."""
    flat, mine = named(rank)
    before = {name: tensor.clone() for name, tensor in mine.items()}
    alone = host_memory.Peers.foreign_bytes()
    peers = host_memory.show(mine, dist.group.WORLD)
    assert peers is not None
    kept = all(tensor.equal(mine[name]) for name, tensor in before.items())
    late = []
    for turn in range(1, ROUNDS + 1):
        flat[:36] = turn  # the storage has moved, and its views with it
        peers.barrier()
        if not all((tensors[name] == turn).all() for tensors in peers.tensors for name in ("head", "body")):
            late.append(turn)
        peers.barrier()
    flat[12:36] = torch.arange(24) + rank
    peers.barrier()
    return {
        "late": late,
        "kept": kept,
        "strides": [tensors["body"].tolist() for tensors in peers.tensors],
        "types": [tensors[f"rank {number}"].tolist() for number, tensors in enumerate(peers.tensors)],
        "foreign": (alone, host_memory.Peers.foreign_bytes()),
    }


def test_tensors_of_other_ranks_are_seen_where_they_are() -> None:
    world = 3
    strides = [(torch.arange(24).view(4, 6).t() + rank).tolist() for rank in range(world)]
    foreign = (world - 1) * (100_000 * 4 + 8)
    for found in run_ranks(look, world):
        assert found["late"] == []
        assert found["kept"]
        assert found["strides"] == strides
        assert found["types"] == [[rank] for rank in range(world)]
        assert found["foreign"] == (0, foreign)


def too_little(rank: int, world: int) -> list[Any]:
    """Rank function: what is shown when one rank of them has no room, or too many storages, and what has moved."""
    flat, mine = named(rank)
    place = flat.data_ptr()
    room = SimpleNamespace(f_bavail=1 if rank else 10**6, f_frsize=4096)
    with mock.patch.object(host_memory.os, "statvfs", return_value=room):
        found: list[Any] = [host_memory.show(mine, dist.group.WORLD)]
    with mock.patch.object(host_memory, "_FILES_SHARE", 10**9 if rank else 2):
        found.append(host_memory.show(mine, dist.group.WORLD))
    return [*found, flat.data_ptr() == place]


def test_nothing_moves_where_one_rank_cannot_share() -> None:
    assert run_ranks(too_little, 2) == [[None, None, True]] * 2


def new_pages(rank: int, world: int) -> list[float]:
    """Rank function: of the pages of large blocks that come and go, the share that the system had to find: before
    freed memory is kept, while it is, and when it has been given back."""
    draw = random.Random(0)
    live: list[torch.Tensor] = []

    def share(rounds: int) -> float:
        before, asked = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0
        for _ in range(rounds):
            live.append(torch.ones(draw.choice([36, 48, 64]) * 2**18))
            asked += live[-1].nbytes
            if len(live) > 2:
                live.pop(draw.randrange(len(live)))
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / asked

    given_back = share(10)
    host_memory.keep_freed()
    share(40)
    kept = share(20)
    live.clear()
    host_memory.give_back()
    return [given_back, kept, share(1)]


def test_freed_memory_is_kept() -> None:
    [[before, kept, after]] = run_ranks(new_pages, 1)
    assert before > 0.9
    assert kept < 0.3
    assert after > 0.9
