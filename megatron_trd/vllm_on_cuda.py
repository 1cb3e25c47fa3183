"""What a vLLM 0.32 engine on a GPU needs to share a process with others; used only by `platform`."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

_Place = tuple[Any, str]  # a module or class, and its attribute


class EngineContext:
    """The stream of one engine, and what vLLM keeps once per process although it belongs to an engine.

    vLLM keeps the stream that is current when it first asks, and passes results on it, whichever thread works later.
    So the engine is started and used on its own stream, after the caller's queued work, and the caller continues after
    it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._own: dict[_Place, Any] | None = None  # while it is not in use

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        caller, own = torch.cuda.current_stream(), self._own or _before_any_engine()
        self._stream.wait_stream(caller)
        others = _exchanged(own)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._own = _exchanged(others)
            caller.wait_stream(self._stream)


def _before_any_engine() -> dict[_Place, Any]:
    """What vLLM keeps once per process, as it is without any engine.

    The scratch memory of experts is the newest engine's, whereas captured graphs write to that of the engine they were
    captured for. A starting engine also drops all graphs of the process once it has measured how much its own will
    take; another engine would then capture its next batches, which computes nothing, and return whatever was in memory.
    The graphs' memory pool cannot serve two streams, nor the graphs of an engine that replaces a dead one.
    """
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.platforms import current_platform
    from vllm.v1.worker import workspace

    return {
        (workspace, "_manager"): None,
        (CUDAGraphWrapper, "_all_instances"): weakref.WeakSet(),
        (BreakableCUDAGraphWrapper, "_all_instances"): weakref.WeakSet(),
        (type(current_platform), "_global_graph_pool"): None,
    }


def _exchanged(values: dict[_Place, Any]) -> dict[_Place, Any]:
    """Put `values` into their places; returns what was there before."""
    before = {place: getattr(*place) for place in values}
    for (owner, name), value in values.items():
        setattr(owner, name, value)
    return before


@contextlib.contextmanager
def keeping_threads() -> Iterator[None]:
    """Restore the host's threads: a starting engine leaves one, but weights are gathered and checked on the host."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_kept: list[Any] = []  # for the life of the process


def keep_allocators() -> None:
    """Before an engine that sleeps is shut down: keep the allocators of its tensors.

    vLLM drops them at shutdown, but some of the engine's tensors are freed later, by calls into them.
    """
    allocator = _allocator()
    pools = allocator.allocator_and_pools.values() if allocator else ()
    _kept.extend(entry[1] for entries in pools for entry in entries)


def _allocator() -> Any:
    module = sys.modules.get("vllm.device_allocator.cumem")  # vLLM imports it for engines that sleep
    return module.CuMemAllocator.instance if module else None


def asleep_bytes() -> int:
    """Bytes released by sleeping engines of this process, which torch's statistics do not reflect."""
    allocator = _allocator()
    found = allocator.pointer_to_data.values() if allocator else ()
    return sum(data.handle[1] for data in found if data.is_asleep)
