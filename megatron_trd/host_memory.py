"""Memory of one machine that several ranks see, without /dev/shm, which containers keep small."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_MARK = 32  # random bytes at the start by which a rank knows that it sees the same memory


def share(size: int, group: Any) -> torch.Tensor | None:
    """`size` bytes that every rank of `group` sees; None if they do not run on one machine. Collective.

    The memory is anonymous: it is gone when the last rank is, however that ends.
    """
    mark, descriptor = secrets.token_bytes(_MARK), -1
    if group.rank() == 0:
        descriptor = os.memfd_create("megatron-trd")
        os.truncate(descriptor, max(size, _MARK))
        os.pwrite(descriptor, mark, 0)
    name: list[Any] = [(f"/proc/{os.getpid()}/fd/{descriptor}", mark)]
    dist.broadcast_object_list(name, group=group, group_src=0)
    memory = _map(*name[0])
    everyone: list[bool] = [False] * group.size()
    dist.all_gather_object(everyone, memory is not None, group=group)
    if group.rank() == 0:
        os.close(descriptor)
    return memory[:size] if memory is not None and all(everyone) else None


def _map(path: str, mark: bytes) -> torch.Tensor | None:
    with contextlib.suppress(OSError, ValueError), Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        if memory[: len(mark)] == mark:
            return torch.frombuffer(memory, dtype=torch.uint8)
    return None
