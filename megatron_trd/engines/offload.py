"""Memory of the device that is lent to others for a while, its contents in pinned host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_trd import platform


class Offload:
    """Moves tensors out of the device's memory and back, bit by bit the same.

    The tensors stay what they are, and views of them too: it is their storages that shrink to nothing and grow again.
    Copies are queued behind the device's work and before what follows; the host does not wait for them.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors  # asked each time: an optimizer makes its state at the first step
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []

    def away(self) -> None:
        """Leave the device; until `back`, nobody may look at the tensors."""
        if self._away:
            return
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        current = platform.current()
        for storage in (storage for storage in storages.values() if len(storage) and current.can_move(storage)):
            self._away.append((storage, current.host_copy(_bytes_of(storage))))
        for storage, _ in self._away:
            storage.resize_(0)

    def back(self) -> None:
        """Return to the device."""
        away, self._away = self._away, []
        for storage, host in away:
            storage.resize_(len(host))
            _bytes_of(storage).copy_(host, non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """`[bytes]` uint8 over a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
