"""Memory of one machine that several ranks see, without /dev/shm, which containers keep small."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import time
from pathlib import Path
from platform import machine
from typing import Any

import torch
import torch.distributed as dist

_YIELDS = 10  # of the processor to another rank before a waiting one sleeps
_NAP_SECONDS = 1e-4
_ORDERED = ("x86_64", "AMD64")  # processors that let nobody see a later write before an earlier one
_LINE = 64  # bytes of a cache line
_MARK = 32  # random bytes at the start by which a rank knows that it sees the same memory


class Shared:
    """Memory that the ranks of one machine see, and a barrier in it.

    The barrier: each rank counts where all see it and looks at the others' counts. That takes some ten microseconds,
    where a message to each takes milliseconds for ranks that share cores. A rank that has died is waited for until
    someone ends the job, which is the launcher's business.
    """

    def __init__(self, whole: torch.Tensor, group: Any) -> None:
        """`whole`: zero bytes but for the mark, `_before(group.size())` more than there are to use."""
        begin = _before(group.size())
        self._group = group
        self.bytes = whole[begin:]
        self._counts = whole[_LINE:begin].numpy().view("int64")[:: _LINE // 8]
        self._mine = self._counts[group.rank() :]

    def barrier(self) -> None:
        """Return when every rank has called this as often as this one has; what they wrote before is seen then."""
        if machine() not in _ORDERED:
            dist.barrier(self._group)
            return
        self._mine[0] += 1
        tries = 0
        while self._counts.min() < self._mine[0]:
            tries += 1
            if tries < _YIELDS:
                os.sched_yield()
            else:
                time.sleep(_NAP_SECONDS)


def _before(ranks: int) -> int:
    """Bytes of the mark and of a count for each rank, a cache line each."""
    return _LINE * (1 + ranks)


def share(size: int, group: Any) -> Shared | None:
    """`size` bytes that every rank of `group` sees; None if they do not run on one machine. Collective.

    The memory is anonymous: it is gone when the last rank is, however that ends.
    """
    mark, descriptor = secrets.token_bytes(_MARK), -1
    if group.rank() == 0:
        descriptor = os.memfd_create("megatron-trd")
        os.truncate(descriptor, _before(group.size()) + size)
        os.pwrite(descriptor, mark, 0)
    name: list[Any] = [(f"/proc/{os.getpid()}/fd/{descriptor}", mark)]
    dist.broadcast_object_list(name, group=group, group_src=0)
    memory = _map(*name[0])
    everyone: list[bool] = [False] * group.size()
    dist.all_gather_object(everyone, memory is not None, group=group)
    if group.rank() == 0:
        os.close(descriptor)
    return Shared(memory, group) if memory is not None and all(everyone) else None


def _map(path: str, mark: bytes) -> torch.Tensor | None:
    with contextlib.suppress(OSError, ValueError), Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        if memory[: len(mark)] == mark:
            return torch.frombuffer(memory, dtype=torch.uint8)
    return None
