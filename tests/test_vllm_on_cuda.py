"""What a GPU's engines share, with a GPU's streams taken for granted: vLLM's own scratch memory, ours around it."""

from __future__ import annotations

import contextlib
import importlib
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_trd import vllm_on_cuda
from megatron_trd.vllm_on_cuda import EngineContext, asleep_bytes


class Stream:
    """Remembers whom it has waited for."""

    def __init__(self, *_: Any) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


@pytest.fixture
def caller(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream that is current outside of an engine's context."""
    streams = [Stream()]

    @contextlib.contextmanager
    def stream(inner: Stream) -> Iterator[None]:
        streams.append(inner)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: streams[-1])
    return streams[0]


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.v1.worker import workspace

    monkeypatch.setattr(workspace, "_manager", None)
    return workspace


def test_each_engine_has_its_own_scratch_memory(caller: Stream, workspace: Any) -> None:
    first, second = EngineContext(torch.device("cpu")), EngineContext(torch.device("cpu"))
    managers = []
    for context in (first, second):
        with context():
            assert workspace._manager is None, "an engine starts without that of another"
            workspace.init_workspace_manager(torch.device("cpu"))
            managers.append(workspace.current_workspace_manager())
    assert workspace._manager is None, "outside it is as it was"
    for context, manager in ((first, managers[0]), (second, managers[1]), (first, managers[0])):
        with context():
            assert workspace._manager is manager


@pytest.mark.parametrize("kind", ["cuda_graph.CUDAGraphWrapper", "breakable_cudagraph.BreakableCUDAGraphWrapper"])
def test_an_engine_that_starts_forgets_no_graph_of_another(caller: Stream, kind: str) -> None:
    """As vLLM's `profile_cudagraph_memory` does (vllm/v1/worker/gpu/cudagraph_utils.py)."""
    module, name = kind.split(".")
    wrapper_class = getattr(importlib.import_module(f"vllm.compilation.{module}"), name)
    before = wrapper_class._all_instances

    def start() -> Any:
        """An engine's start: it measures its graphs, forgets them, and captures them for good."""
        with mock.patch(f"vllm.compilation.{module}.current_platform"):
            wrapper = wrapper_class(lambda: None, SimpleNamespace(compilation_config=None), mock.Mock())
        graphs = wrapper.__dict__["entries" if "entries" in wrapper.__dict__ else "concrete_cudagraph_entries"]
        graphs["measured"] = object()
        wrapper_class.clear_all_graphs()
        assert not graphs, "its own it does forget"
        graphs["captured"] = object()
        return wrapper, graphs

    first, second = EngineContext(torch.device("cpu")), EngineContext(torch.device("cpu"))
    with first():
        wrapper, graphs = start()
    with second():
        other, _ = start()
    assert list(graphs) == ["captured"]
    for context, expected in ((first, wrapper), (second, other)):
        with context():
            assert list(wrapper_class._all_instances) == [expected]
    assert wrapper_class._all_instances is before


def test_each_engine_s_graphs_have_memory_of_their_own(caller: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    # what only a GPU has
    monkeypatch.setattr(type(current_platform), "graph_pool_handle", lambda _: object(), raising=False)
    first, second = EngineContext(torch.device("cpu")), EngineContext(torch.device("cpu"))
    pools = []
    for context in (first, second, first, second):
        with context():
            pools.append(current_platform.get_global_graph_pool())
    assert pools[0] is pools[2] is not pools[1] is pools[3]
    assert type(current_platform)._global_graph_pool is None


def test_an_engine_leaves_its_process_as_many_threads_as_it_had() -> None:
    threads = torch.get_num_threads()
    with vllm_on_cuda.keeping_threads():
        torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads


def test_an_engine_that_is_shut_down_leaves_none_to_the_next(caller: Stream, workspace: Any) -> None:
    context = EngineContext(torch.device("cpu"))
    with context():
        workspace.init_workspace_manager(torch.device("cpu"))
    with context():
        workspace.reset_workspace_manager()  # as vLLM's shutdown does
    with context():
        assert workspace._manager is None


def test_work_is_behind_the_caller_s_and_before_what_follows_also_after_an_error(
    caller: Stream, workspace: Any
) -> None:
    context = EngineContext(torch.device("cpu"))
    inner = None

    def fail() -> None:
        nonlocal inner
        with context():
            inner = torch.cuda.current_stream()
            workspace.init_workspace_manager(torch.device("cpu"))
            assert caller.waited == []
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        fail()
    assert isinstance(inner, Stream)
    assert inner is not caller
    assert inner.waited == [caller]
    assert caller.waited == [inner]
    assert workspace._manager is None
    with context():
        assert workspace.current_workspace_manager() is not None


def test_what_allocated_an_engine_s_memory_outlives_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.device_allocator.cumem", raising=False)
    vllm_on_cuda.keep_allocators()  # no engine that can sleep has been made

    class Allocator:
        pass

    pools = {tag: [(object(), Allocator())] for tag in ("weights", "kv_cache")}
    alive = [weakref.ref(entry[1]) for entries in pools.values() for entry in entries]
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=SimpleNamespace(allocator_and_pools=pools)))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    vllm_on_cuda.keep_allocators()
    pools.clear()  # as vLLM's shutdown does
    assert all(allocator() is not None for allocator in alive)


def test_bytes_that_sleeping_engines_have_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.device_allocator.cumem", raising=False)
    assert asleep_bytes() == 0, "no engine that can sleep has been made"
    tensors = {number: SimpleNamespace(handle=(0, 100 + number), is_asleep=number > 0) for number in range(3)}
    allocator = SimpleNamespace(instance=SimpleNamespace(pointer_to_data=tensors))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", SimpleNamespace(CuMemAllocator=allocator))
    assert asleep_bytes() == 101 + 102
