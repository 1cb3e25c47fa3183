"""Which columns of the vocabulary a rank holds, and the few collectives the losses need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Gathering(NamedTuple):
    """An all-gather in progress."""

    tensor: Tensor  # [ranks, ...], to be read after `wait`
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class VocabShard:
    """A rank's slice of a vocabulary cut into equal slices, in rank order, with the padding at its end."""

    group: dist.ProcessGroup | None
    rank: int  # place in the group
    size: int  # ranks in the group
    start: int  # global index of the first column
    columns: int  # real columns held here, 0 for a shard of padding alone
    vocabulary: int  # real columns in all shards

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, width: int, vocab_size: int | None) -> VocabShard:
        """The shard of this rank, when every rank of `group` holds `width` columns, padding included."""
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        vocabulary = width * size if vocab_size is None else vocab_size
        if not 0 < vocabulary <= width * size:
            raise ValueError(f"vocab_size {vocab_size} does not fit {size} shard(s) of {width} columns")
        start = rank * width
        return cls(group, rank, size, start, min(max(vocabulary - start, 0), width), vocabulary)

    @classmethod
    def whole(cls, columns: int) -> VocabShard:
        """A vocabulary that every rank holds completely."""
        return cls(None, 0, 1, 0, columns, columns)

    def start_gather(self, packed: Tensor) -> Gathering:
        """Start gathering `[...]` of every rank into `[ranks, ...]`, in rank order; one collective."""
        if self.size == 1:
            return Gathering(packed.unsqueeze(0), None)
        gathered = packed.new_empty(self.size * packed.shape[0], *packed.shape[1:])  # the layout that gloo requires
        work = dist.all_gather_into_tensor(gathered, packed.contiguous(), group=self.group, async_op=True)
        return Gathering(gathered.view(self.size, *packed.shape), work)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_sum_(self, tensor: Tensor) -> list[dist.Work]:
        """Start the sum over the ranks, in place; the caller waits on the returned work before reading `tensor`."""
        if self.size == 1:
            return []
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return [] if work is None else [work]


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is (so that gradients can be checked numerically), float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
