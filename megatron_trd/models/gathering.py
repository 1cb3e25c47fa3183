"""Full tensors of a model that is spread over a grid: flat buckets, one exchange a bucket.

The ranks that hold a whole model between them (`Layout.copies`) work together, all pipeline stages at once. Where they
share a machine's memory, each writes its shards to their place in full tensors that all of them see: buckets small
enough to stay in the processor's cache until all have read them, the next written while others read the last. Where
they do not, a bucket is one all-gather of each rank's shards, one behind the other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.host_memory import Shared
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.loading import find
from megatron_trd.models.weights import Slot, exported_slots, merge, place, shard_shape, slots, stage_of
from megatron_trd.parallel.grid import Grid


@dataclass(frozen=True)
class Bucket:
    """Consecutive slots that are exchanged together."""

    slots: tuple[Slot, ...]

    @functools.cached_property
    def size(self) -> int:
        """Elements of its Hugging Face tensors."""
        return sum(_size(slot) for slot in self.slots)


def _size(slot: Slot) -> int:
    return sum(torch.Size(shape).numel() for shape in slot.shapes)


def buckets(table: Sequence[Slot], limit: int) -> list[Bucket]:
    """Slots in buckets of at most `limit` elements; more only where one slot, or the experts of a layer, have more.

    A layer's experts stay together: vLLM keeps the tensors it is given until it has all of the layer's.
    """
    filled: list[list[Slot]] = []
    room = 0
    for _, unit in itertools.groupby(table, key=lambda slot: slot.hf if slot.expert is None else slot.layer):
        together = list(unit)
        size = sum(map(_size, together))
        if size > room:
            filled.append([])
            room = limit
        filled[-1] += together
        room -= size
    return [Bucket(tuple(group)) for group in filled]


class GatheredSource:
    """A `loading.Source` of a running model's weights. Collective: every rank asks for every slot in order.

    What it gives is valid until a slot of another bucket is asked for, or the weights change: copy what is kept.
    """

    # Whose buckets are in the memory that the ranks of a copy share.
    _in_memory: ClassVar[dict[tuple[int, ...], object]] = {}

    def __init__(
        self,
        named: Mapping[str, Tensor],
        arch: Architecture,
        grid: Grid,
        bucket_bytes: int,
        table: Sequence[Slot] | None = None,
    ) -> None:
        """`named`: this rank's parameters by global Megatron name; `table`: their slots, if not the whole model's."""
        self.named, self.arch, self.grid = named, arch, grid
        self._embedding = slots(arch)[0]
        current = platform.current()
        limit = min(bucket_bytes, current.bucket_bytes or bucket_bytes) // current.dtype.itemsize
        self._buckets = buckets(table or exported_slots(arch), limit)
        self._bucket_of = {slot: number for number, bucket in enumerate(self._buckets) for slot in bucket.slots}
        self._present: int | None = None
        self._full: dict[Slot, Callable[[], list[Tensor]]] = {}

    def __call__(self, slot: Slot) -> list[Tensor]:
        slot = slot if slot.exported else self._embedding  # the tied head: its one tensor is the embedding
        number = self._bucket_of[slot]
        if number != self._present or self._in_memory.get(self._key, self) is not self:
            self._exchange(number)
        return self._full[slot]()

    @property
    def _key(self) -> tuple[int, ...]:
        return tuple(self.grid.copy)

    def _exchange(self, number: int) -> None:
        bucket = self._buckets[number]
        self._full = {}  # before the next: one bucket at a time
        if len(self.grid.copy) == 1:
            self._full = {slot: self._merged(slot, [self._own(slot)]) for slot in bucket.slots}
        elif (shared := self._shared()) is not None:
            self._write(number, shared)
        else:
            self._gather(bucket)
        self._present = number

    def _shared(self) -> Shared | None:
        """Memory that all ranks of the copy see, with room for a bucket and the next."""
        sizes = [bucket.size for bucket in self._buckets]
        size = max(map(sum, itertools.pairwise(sizes)), default=sizes[0])
        current = platform.current()
        return current.shared_memory(size * current.dtype.itemsize, self.grid.copy, self.grid.copy_group)

    def _write(self, number: int, shared: Shared) -> None:
        """Each rank's shards to their place in the full tensors.

        They lie by turns at the beginning of the memory and at its end: one bucket is written while the last is read.
        """
        if self._in_memory.get(self._key) is not self or number - 1 != self._present:
            shared.barrier()  # everyone has read what may lie in the same place
        self._in_memory[self._key] = self
        bucket = self._buckets[number]
        whole = shared.bytes.view(platform.current().dtype)
        memory = whole[-bucket.size :] if number % 2 else whole[: bucket.size]
        views = iter(memory.split([torch.Size(shape).numel() for slot in bucket.slots for shape in slot.shapes]))
        for slot in bucket.slots:
            full = [next(views).view(shape) for shape in slot.shapes]
            self._full[slot] = lambda full=full: full  # type: ignore[misc]
            holders = self._holders(slot)
            if dist.get_rank() in holders:
                rank = holders.index(dist.get_rank())
                place(slot, self._own(slot), full, self.arch, rank, len(holders))
        shared.barrier()  # it is whole, and everyone has read the bucket before

    def _gather(self, bucket: Bucket) -> None:
        """One all-gather of every rank's shards; full tensors are put together when they are asked for."""
        current, copy = platform.current(), self.grid.copy
        held: dict[int, list[Slot]] = {rank: [] for rank in copy}
        for slot in bucket.slots:
            for rank in self._holders(slot):
                held[rank].append(slot)
        shapes = {slot: shard_shape(slot, self.arch, len(self._holders(slot))) for slot in bucket.slots}
        sizes = {rank: [shapes[slot].numel() for slot in held[rank]] for rank in copy}
        longest = max(map(sum, sizes.values()))
        flat = torch.empty(longest, dtype=current.dtype, device=current.device)
        mine = dist.get_rank()
        for slot, target in zip(held[mine], flat[: sum(sizes[mine])].split(sizes[mine]), strict=True):
            target.view(shapes[slot]).copy_(self._own(slot))
        gathered = flat.new_empty(len(copy) * longest)
        dist.all_gather_into_tensor(gathered, flat, group=self.grid.copy_group)
        found: dict[Slot, list[Tensor]] = {slot: [] for slot in bucket.slots}
        for rank, part in zip(copy, gathered.split(longest), strict=True):
            for slot, shard in zip(held[rank], part[: sum(sizes[rank])].split(sizes[rank]), strict=True):
                found[slot].append(shard.view(shapes[slot]))
        self._full = {slot: self._merged(slot, shards) for slot, shards in found.items()}

    def _merged(self, slot: Slot, shards: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: merge(slot, shards, self.arch)

    def _holders(self, slot: Slot) -> list[int]:
        """Ranks of this copy whose shards make the slot's tensors, in order."""
        layout = self.grid.layout
        stage = len(self.grid.copy) // layout.pp
        first = stage_of(slot, self.arch, layout.pp) * stage
        if slot.expert is not None:
            first += slot.expert // (self.arch.experts // layout.ep)
        count = layout.tp if slot.expert is None and slot.kind != "replicated" else 1
        return self.grid.copy[first : first + count]

    def _own(self, slot: Slot) -> Tensor:
        parameter = find(slot, self.named)
        assert parameter is not None, f"no parameter for {slot.hf} on this rank"
        return parameter.detach()
