"""Values that ranks tell one another, of any type that can be pickled; the ranks of a job trust one another."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def from_first(value: _T, group: Any = None) -> _T:
    """The value of the first rank of `group`, on each of its ranks. Collective."""
    held = [value]
    dist.broadcast_object_list(held, group=group, group_src=0)
    return held[0]


def from_all(value: _T, group: Any = None) -> list[_T]:
    """The value of each rank of `group`, in their order. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone
