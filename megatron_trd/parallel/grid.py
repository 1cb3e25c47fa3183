"""Parallel layouts: which rank holds which tensor shard, pipeline stage and data-parallel replica.

The student's grid is megatron-core's global `parallel_state`. The teacher's is a second TP x PP x DP grid over the same
ranks, made with `HyperCommGrid` and handed to its model and schedule as a `ProcessGroupCollection`. Both number ranks
the same way, tensor-parallel fastest, then data-parallel, then pipeline: `rank = tp + TP * (dp + DP * pp)`.

Experts have a layout of their own over the ranks of a pipeline stage: each is whole on one rank (no tensor parallelism
inside an expert), `ep` neighbouring ranks share a layer's experts, and the groups of `ep` are replicas.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.errors import UserError

EXPERT_TP = 1  # ranks that share one expert


@dataclass(frozen=True)
class Layout:
    """TP x PP x DP over `world` ranks, experts over `ep` of each stage's TP x DP."""

    tp: int
    pp: int
    world: int
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world % (self.tp * self.pp):
            raise UserError(
                f"world size {self.world} does not fit tp={self.tp} x pp={self.pp}: "
                f"use a multiple of {self.tp * self.pp} ranks (world_size=…) or a smaller layout"
            )
        if self.tp * self.dp % self.ep:
            raise UserError(
                f"ep={self.ep} does not divide the {self.tp * self.dp} ranks of a pipeline stage (tp x dp): use a "
                f"multiple of {self.pp * math.lcm(self.tp, self.ep)} ranks (world_size=…) or a smaller layout"
            )

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, pp, dp) coordinates of a rank."""
        return rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp

    def rank(self, tp: int, pp: int, dp: int) -> int:
        """Rank at (tp, pp, dp)."""
        return tp + self.tp * (dp + self.dp * pp)

    @property
    def copies(self) -> list[list[int]]:
        """For each copy of the model, the ranks that together hold it: stage by stage, in rank order.

        A copy takes as many neighbouring ranks of every stage as tensor or expert parallelism spreads a tensor over.
        """
        block, stage = math.lcm(self.tp, self.ep), self.tp * self.dp
        return [
            [pp * stage + first + place for pp in range(self.pp) for place in range(block)]
            for first in range(0, stage, block)
        ]

    def last_stage(self, dp: int) -> list[int]:
        """Ranks of one replica's last pipeline stage, in tensor-parallel order."""
        return [self.rank(tp, self.pp - 1, dp) for tp in range(self.tp)]


@dataclass(frozen=True)
class Grid:
    """A layout with its process groups, seen from this rank."""

    layout: Layout
    groups: Any  # megatron.core.process_groups_config.ProcessGroupCollection
    tp_rank: int
    pp_rank: int
    dp_rank: int
    ep_rank: int
    copy: list[int]  # ranks of this rank's whole copy of the model (see `Layout.copies`)
    copy_group: Any

    def tensor_rank(self, *, expert: bool) -> tuple[int, int]:
        """This rank's place among the ranks that share a tensor, and their number."""
        return (0, 1) if expert else (self.tp_rank, self.layout.tp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1


def student_grid(tp: int, pp: int, ep: int = 1, *, seed: int) -> Grid:
    """Initialise megatron-core's global groups and random states. Raises `UserError` on a bad world size."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    layout = Layout(tp, pp, dist.get_world_size(), ep)
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=EXPERT_TP,
        distributed_timeout_minutes=int(platform.PATIENCE.total_seconds()) // 60,
    )
    with platform.current().megatron():
        model_parallel_cuda_manual_seed(seed)  # layers request random states when built, with or without dropout
    return _grid(layout, ProcessGroupCollection.use_mpu_process_groups())


def teacher_grid(tp: int, pp: int, ep: int = 1) -> Grid:
    """A second grid over the same ranks, separate from the global one. Every rank must call this."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    layout = Layout(tp, pp, dist.get_world_size(), ep)
    grid = HyperCommGrid([tp, 1, layout.dp, pp], ["tp", "cp", "dp", "pp"], backend=dist.get_backend())
    groups = ProcessGroupCollection()
    make = functools.partial(grid.create_pg, timeout=platform.PATIENCE)
    for name in ("tp", "cp", "dp", "pp"):
        setattr(groups, name, make(name))
    groups.mp = make(["tp", "pp"])
    groups.dp_cp = make(["dp", "cp"])
    groups.tp_cp = make(["tp", "cp"])
    groups.tp_dp_cp = make(["tp", "dp", "cp"])
    replicas = tp * layout.dp // (EXPERT_TP * ep)
    experts = HyperCommGrid([EXPERT_TP, ep, replicas, pp], ["tp", "ep", "dp", "pp"], backend=dist.get_backend())
    make = functools.partial(experts.create_pg, timeout=platform.PATIENCE)
    groups.ep, groups.expt_tp, groups.expt_dp = make("ep"), make("tp"), make("dp")
    groups.tp_ep = make(["tp", "ep"])
    groups.tp_ep_pp = make(["tp", "ep", "pp"])
    groups.embd, groups.pos_embd = _embedding_groups(layout)
    return _grid(layout, groups)


def _grid(layout: Layout, groups: Any) -> Grid:
    rank = dist.get_rank()
    copy = next(ranks for ranks in layout.copies if rank in ranks)
    copy_group, _ = dist.new_subgroups_by_enumeration(layout.copies, timeout=platform.PATIENCE)
    return Grid(layout, groups, *layout.coordinates(rank), rank % layout.ep, copy, copy_group)


def _embedding_groups(layout: Layout) -> tuple[Any, Any]:
    """Groups of first and last stage (tied embeddings) and of the first stage alone, one for each pipeline."""
    embedding, position = None, None
    for dp in range(layout.dp):
        for tp in range(layout.tp):
            first, last = layout.rank(tp, 0, dp), layout.rank(tp, layout.pp - 1, dp)
            both, only = (
                dist.new_group(ranks, timeout=platform.PATIENCE) for ranks in (sorted({first, last}), [first])
            )
            if dist.get_rank() in (first, last):
                embedding = both
            if dist.get_rank() == first:
                position = only
    return embedding, position
