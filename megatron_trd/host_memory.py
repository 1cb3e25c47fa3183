"""Host memory: kept by a process when freed, and shared by ranks that read each other's tensors in place."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import secrets
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from platform import machine
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.parallel.objects import from_all, from_first

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST_BYTES = 2**31 - 1  # an int
_YIELDS = 10  # times that a waiting rank yields the processor before it sleeps
_NAP_SECONDS = 1e-4
_ORDERED = ("x86_64", "AMD64")  # processors on which no later write is visible before an earlier one
_LINE = 64  # bytes of a cache line
_MARK = 32  # random bytes at the start by which a rank recognises the same memory
_FILES_SHARE = 2  # each rank that reads a storage opens it as a file: half of those allowed are left for others
_SHARED_FILES = Path("/dev/shm")  # where torch puts shared memory; it may be small in containers


def keep_freed() -> None:
    """Let this process reuse the memory that it frees instead of returning it to the system.

    glibc returns every block above 32 MiB, and the system then zeroes each page of the next one: a third of a training
    step (a sum of 64 MiB took 55 ms, and 15 ms in kept memory). The price is that allocations of many sizes take up to
    twice the memory in use at their peak, until `give_back`.
    """
    libc = ctypes.CDLL(None)
    for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(option, _MOST_BYTES)


def give_back() -> None:
    """Return all freed memory to the system: between phases, where it costs little."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Barrier:
    """A barrier for the ranks of one machine.

    Each rank increments a counter that all can see and reads the others' counters. That takes about ten microseconds,
    whereas a message to each takes milliseconds for ranks that share cores. A rank that has died is waited for until
    the job is ended, which is up to the launcher.
    """

    def __init__(self, memory: Tensor, group: Any) -> None:
        """`memory`: zero bytes except for the mark; a cache line for the mark and one for each rank."""
        self._group = group
        self._counts = memory[_LINE:].numpy().view("int64")[:: _LINE // 8]
        self._mine = self._counts[group.rank() :]

    def __call__(self) -> None:
        """Return when every rank has called this as often as this one; what they wrote before is then visible."""
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


def barrier(group: Any) -> Barrier | None:
    """A barrier for the ranks of `group`; None if they do not run on one machine. Collective.

    Its memory is anonymous: it is released when the last rank ends, however that happens.
    """
    mark, descriptor = secrets.token_bytes(_MARK), -1
    if group.rank() == 0:
        descriptor = os.memfd_create("megatron-trd")
        os.truncate(descriptor, _LINE * (1 + group.size()))
        os.pwrite(descriptor, mark, 0)
    memory = _marked(*from_first((f"/proc/{os.getpid()}/fd/{descriptor}", mark), group))
    together = all(from_all(memory is not None, group))
    if group.rank() == 0:
        os.close(descriptor)
    return Barrier(memory, group) if memory is not None and together else None


def _marked(path: str, mark: bytes) -> Tensor | None:
    with contextlib.suppress(OSError, ValueError), Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        if memory[: len(mark)] == mark:
            return torch.frombuffer(memory, dtype=torch.uint8)
    return None


class Peers:
    """Tensors of all ranks of a group, each where its rank has it, and a barrier for reading them."""

    _alive: ClassVar[weakref.WeakSet[Peers]] = weakref.WeakSet()

    def __init__(self, tensors: list[Mapping[str, Tensor]], foreign: int, barrier: Barrier) -> None:
        self.tensors = tensors  # by name, of each rank of the group
        self.barrier = barrier
        self._foreign = foreign  # bytes of other ranks' tensors
        self._alive.add(self)

    @classmethod
    def foreign_bytes(cls) -> int:
        """Bytes of other ranks' tensors that also count as this process's memory, since it maps them."""
        return sum(peers._foreign for peers in cls._alive)


def show(named: Mapping[str, Tensor], group: Any) -> Peers | None:
    """Move tensors to memory visible to every rank of `group`, and map the other ranks' tensors. Collective.

    Their storages move, and with them all views. Returns None, with nothing moved, if the ranks do not run on one
    machine, a rank has too many storages, or there is too little memory to share.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in named.values()}
    together = barrier(group)
    if not all(from_all(together is not None and _fit(list(storages.values()), group.size()), group)):
        return None
    assert together is not None
    numbers = {pointer: number for number, pointer in enumerate(storages)}
    where = {
        name: (numbers[tensor.untyped_storage().data_ptr()], tensor.dtype, _place(tensor))
        for name, tensor in named.items()
    }
    # torch's own way to share a storage, which swaps its memory; the descriptor stays open for the storage's lifetime.
    descriptors = [storage._share_fd_cpu_()[0] for storage in storages.values()]
    files = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors]
    tensors: list[Mapping[str, Tensor]] = []
    foreign = 0
    for rank, (files_of_rank, where_of_rank) in enumerate(from_all((files, where), group)):
        if rank == group.rank():
            tensors.append(named)
            continue
        memories = [_mapped(file) for file in files_of_rank]
        foreign += sum(map(len, memories))
        tensors.append(
            {
                name: torch.frombuffer(memories[number], dtype=dtype).as_strided(*place)
                for name, (number, dtype, place) in where_of_rank.items()
            }
        )
    together()  # all ranks have opened what they read
    return Peers(tensors, foreign, together)


def _fit(storages: list[torch.UntypedStorage], ranks_of_group: int) -> bool:
    """Whether this machine's ranks can share as much as this one is about to."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        room = os.statvfs(_SHARED_FILES)
        needed = sum(storage.nbytes() for storage in storages if not storage.is_shared())
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        opened = len(os.listdir("/proc/self/fd")) + len(storages) * ranks_of_group
        return opened <= files // _FILES_SHARE and needed * ranks <= room.f_bavail * room.f_frsize
    return False


def _place(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    """Where a tensor lies in its storage: what `as_strided` takes."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _mapped(path: str) -> mmap.mmap:
    """Map a file into memory with all of its pages at once, so that they count at once and cost nothing later."""
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
