"""What a vLLM 0.32 engine on a GPU needs to share a process with others; `platform` alone uses this."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


class EngineContext:
    """The stream and the scratch memory of one engine.

    vLLM keeps the stream that is current when it first asks, and hands results over there, whichever thread works
    later: so it is started and used on one stream of its own, behind what the caller has queued, and the caller goes on
    behind it. The scratch memory of experts is one for a process in vLLM, the newest engine's; captured graphs write to
    that of the engine they were captured for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._workspace: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        from vllm.v1.worker import workspace

        caller, another = torch.cuda.current_stream(), workspace._manager
        self._stream.wait_stream(caller)
        workspace._manager = self._workspace
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._workspace, workspace._manager = workspace._manager, another
            caller.wait_stream(self._stream)


_kept: list[Any] = []  # for the life of the process


def keep_allocators() -> None:
    """Before an engine that sleeps is shut down: keep what its tensors were allocated with.

    vLLM forgets it there, but some of the engine's tensors are freed later, by a call into it.
    """
    allocator = _allocator()
    pools = allocator.allocator_and_pools.values() if allocator else ()
    _kept.extend(entry[1] for entries in pools for entry in entries)


def _allocator() -> Any:
    module = sys.modules.get("vllm.device_allocator.cumem")  # vLLM imports it for engines that sleep
    return module.CuMemAllocator.instance if module else None


def asleep_bytes() -> int:
    """Bytes that sleeping engines of this process have given back; torch's statistics do not know it."""
    allocator = _allocator()
    found = allocator.pointer_to_data.values() if allocator else ()
    return sum(data.handle[1] for data in found if data.is_asleep)
