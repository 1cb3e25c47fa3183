"""Frees device memory temporarily by moving its contents to pinned host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_trd import platform

_LEAST, _MOST = 2**20, 2**30  # bytes of one host buffer


class Offload:
    """Moves tensors out of device memory and back, bitwise unchanged.

    The tensor objects and their views are kept: only their storages are resized to zero and back. Copies are queued
    after the device's pending work and before later work; the host does not wait for them.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors  # called each time: an optimizer creates its state at the first step
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # and the bytes of each
        self._host: list[Tensor] = []  # their contents, one after another

    def away(self) -> None:
        """Move the tensors off the device; they must not be accessed until `back`."""
        if self._away:
            return
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        current = platform.current()
        moved = [storage for storage in storages.values() if len(storage) and current.can_move(storage)]
        self._away = [(storage, len(storage)) for storage in moved]
        self._host = [current.host_bytes(size) for size in _sizes(sum(map(len, moved)))]
        for device, host in _stretches(moved, self._host):
            host.copy_(device, non_blocking=True)
        for storage in moved:
            storage.resize_(0)

    def back(self) -> None:
        """Move the tensors back to the device."""
        for storage, size in self._away:
            storage.resize_(size)
        for device, host in _stretches([storage for storage, _ in self._away], self._host):
            device.copy_(host, non_blocking=True)
        self._away, self._host = [], []


def _sizes(total: int) -> Iterator[int]:
    """Powers of two that together hold `total` bytes and little more: torch allocates pinned memory only in powers of
    two and rounds requests up (c10 CachingHostAllocator)."""
    while total > 0:
        yield (size := max(_LEAST, min(_MOST, 1 << (total.bit_length() - 1))))
        total -= size


def _stretches(storages: Iterable[torch.UntypedStorage], host: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (device, host) of byte ranges of equal length that together cover all of the storages."""
    rest = iter(host)
    there = torch.empty(0, dtype=torch.uint8)
    for storage in storages:
        here = _bytes_of(storage)
        while len(here):
            there = there if len(there) else next(rest)
            size = min(len(here), len(there))
            yield here[:size], there[:size]
            here, there = here[size:], there[size:]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A `[bytes]` uint8 view of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
