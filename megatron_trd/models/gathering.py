"""Full tensors of a model that is sharded over a grid.

The ranks that together hold a whole model (`Layout.copies`) cooperate. If they share a machine's memory, each reads the
others' shards in place. Otherwise shards are exchanged in flat buckets: only the ranks that have shards of a bucket
send, to all others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.host_memory import Peers
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.loading import find
from megatron_trd.models.weights import Piece, Slot, exported_slots, merge, pieces, shard_shape, slots, stage_of, uncut
from megatron_trd.parallel.grid import Grid


@dataclass(frozen=True)
class Bucket:
    """Consecutive slots that are exchanged together."""

    slots: tuple[Slot, ...]

    @functools.cached_property
    def size(self) -> int:
        """Elements of its Hugging Face tensors."""
        return sum(slot.size for slot in self.slots)


def buckets(table: Sequence[Slot], limit: int) -> list[Bucket]:
    """Slots in buckets of at most `limit` elements; more only where one slot, or the experts of a layer, have more.

    A layer's experts stay together: vLLM keeps the tensors it is given until it has all of the layer's.
    """
    filled: list[list[Slot]] = []
    room = 0
    for _, unit in itertools.groupby(table, key=lambda slot: slot.hf if slot.expert is None else slot.layer):
        together = list(unit)
        size = sum(slot.size for slot in together)
        if size > room:
            filled.append([])
            room = limit
        filled[-1] += together
        room -= size
    return [Bucket(tuple(group)) for group in filled]


class GatheredSource:
    """A `loading.Source` of a running model's weights. Collective: every rank requests every slot in order.

    Its tensors are valid until a slot of another bucket is requested or the weights change: copy what is kept.
    """

    def __init__(self, weights: SpreadWeights, table: Sequence[Slot] | None = None) -> None:
        """`table`: the slots of `weights`, if not the whole model's."""
        self.named, self.arch, self.grid, peers = weights.named, weights.arch, weights.grid, weights.peers
        # Parameters of each rank of the copy, if this one can see them all.
        self._seen = peers.tensors if peers else [self.named] if len(self.grid.copy) == 1 else None
        self._embedding = slots(self.arch)[0]
        self._dtype = weights.dtype
        self._table, self._limit = table, weights.bucket_bytes // self._dtype.itemsize
        self._present: Bucket | None = None
        self._full: dict[Slot, Callable[[], list[Tensor]]] = {}
        if peers:
            peers.barrier()  # all ranks' weights are up to date

    def __call__(self, slot: Slot) -> list[Tensor]:
        slot = self._exported(slot)
        if self._seen:
            return merge(slot, self._shards(slot, self._seen), self.arch)
        bucket = self._bucket_of[slot]
        if bucket is not self._present:
            self._full = {}  # freed before the next: one bucket at a time
            self._full = self._exchange(bucket)
            self._present = bucket
        return self._full[slot]()

    @functools.cached_property
    def _bucket_of(self) -> dict[Slot, Bucket]:
        filled = buckets(self._table or exported_slots(self.arch), self._limit)
        return {slot: bucket for bucket in filled for slot in bucket.slots}

    def pieces(self, slot: Slot) -> list[Piece]:
        """The tensors of `self(slot)` in pieces: in place on the ranks that hold them, if this one can see them."""
        if not self._seen:
            return uncut(self(slot))
        slot = self._exported(slot)
        shards = self._shards(slot, self._seen)
        return [piece for rank, part in enumerate(shards) for piece in pieces(slot, part, self.arch, rank, len(shards))]

    def _exported(self, slot: Slot) -> Slot:
        return slot if slot.exported else self._embedding  # the tied head: its one tensor is the embedding

    def _shards(self, slot: Slot, seen: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        return [self._of(slot, seen[self.grid.copy.index(rank)]) for rank in self._holders(slot)]

    def _exchange(self, bucket: Bucket) -> dict[Slot, Callable[[], list[Tensor]]]:
        """Send every rank's shards to all ranks; full tensors are assembled on request.

        A bucket's slots mostly belong to one pipeline stage. An all-gather, to which all ranks contribute equally,
        would move it as often as there are stages.
        """
        current, copy = platform.current(), self.grid.copy
        held: dict[int, list[Slot]] = {rank: [] for rank in copy}
        for slot in bucket.slots:
            for rank in self._holders(slot):
                held[rank].append(slot)
        shapes = {slot: shard_shape(slot, self.arch, len(self._holders(slot))) for slot in bucket.slots}
        sizes = {rank: [shapes[slot].numel() for slot in held[rank]] for rank in copy}
        gathered = torch.empty(sum(map(sum, sizes.values())), dtype=self._dtype, device=current.device)
        parts = dict(zip(copy, gathered.split([sum(sizes[rank]) for rank in copy]), strict=True))
        mine = dist.get_rank()
        for slot, target in zip(held[mine], parts[mine].split(sizes[mine]), strict=True):
            target.view(shapes[slot]).copy_(self._of(slot, self.named))
        senders = [rank for rank in copy if held[rank]]
        sent = [dist.broadcast(parts[rank], rank, group=self.grid.copy_group, async_op=True) for rank in senders]
        for work in sent:
            work.wait()
        found: dict[Slot, list[Tensor]] = {slot: [] for slot in bucket.slots}
        for rank in senders:
            for slot, shard in zip(held[rank], parts[rank].split(sizes[rank]), strict=True):
                found[slot].append(shard.view(shapes[slot]))
        return {slot: functools.partial(merge, slot, shards, self.arch) for slot, shards in found.items()}

    def _holders(self, slot: Slot) -> list[int]:
        """Ranks of this copy whose shards make up the slot's tensors, in order."""
        layout = self.grid.layout
        stage = len(self.grid.copy) // layout.pp
        first = stage_of(slot, self.arch, layout.pp) * stage
        if slot.expert is not None:
            first += slot.expert // (self.arch.experts // layout.ep)
        count = layout.tp if slot.expert is None and slot.kind != "replicated" else 1
        return self.grid.copy[first : first + count]

    @staticmethod
    def _of(slot: Slot, named: Mapping[str, Tensor]) -> Tensor:
        parameter = find(slot, named)
        assert parameter is not None, f"no parameter for {slot.hf} on this rank"
        return parameter.detach()


class SpreadWeights:
    """The weights of a running model, as a source of full tensors."""

    def __init__(
        self,
        named: Mapping[str, Tensor],
        arch: Architecture,
        grid: Grid,
        bucket_bytes: int,
        *,
        dtype: torch.dtype | None = None,
        shown: bool = True,
    ) -> None:
        """`named`: this rank's tensors by global Megatron name, of `dtype` (None: the platform's); `shown`: move them
        to where the other ranks of `grid.copy` can read them, if there is such a place. Collective then."""
        current = platform.current()
        self.named, self.arch, self.grid, self.bucket_bytes = named, arch, grid, bucket_bytes
        self.dtype = dtype or current.dtype
        # Done now: moving tensors takes memory for the largest storage, which is scarce later.
        self.peers: Peers | None = current.peers(named, grid.copy_group) if shown else None

    def source(self, table: Sequence[Slot] | None = None) -> GatheredSource:
        """The current weights of the slots in `table`, or of all. Collective."""
        return GatheredSource(self, table)

    def settle(self) -> None:
        """Wait until no rank reads these weights any more, before they change. Collective."""
        if self.peers:
            self.peers.barrier()
