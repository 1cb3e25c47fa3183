"""Replacements on a CPU for what megatron-core needs a GPU for; used only by `platform`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def patches() -> Iterator[None]:
    """Context in which megatron-core code runs on a CPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA_ON_CPU))
        for name, value in _MEGATRON_ON_CPU.items():
            stack.enter_context(mock.patch(f"megatron.core.{name}", value, create=True))
        stack.enter_context(_recomputation_on_cpu())
        stack.enter_context(_CudaMeansCpu())
        yield


class _Stream:
    """A CUDA stream on which all work is done immediately."""

    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return self


_STREAM = _Stream()

# What megatron-core 0.16 uses of torch.cuda without checking for a GPU, and its replacement on a CPU.
_CUDA_ON_CPU: dict[str, Any] = {
    "current_device": lambda: torch.device("cpu"),  # device of gradient buffers, pipeline tensors, scalars
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,  # around pipeline communication and checkpoint saves
    "empty_cache": lambda: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)) and None,
    "manual_seed_all": lambda *_: None,
    "Stream": lambda *_, **__: _STREAM,  # on which experts' token counts are copied to the host
    "current_stream": lambda *_: _STREAM,
}


def _norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
    """torch's RMSNorm for megatron-core's local layers, including sequence parallelism, which megatron-core refuses:
    only the weight has to be marked, so that its gradient is summed over the ranks that hold other tokens."""
    norm = torch.nn.RMSNorm(hidden_size, eps=eps)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined,assignment]
    return norm


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


# Names in megatron-core and their replacements on a CPU. Given by name so that megatron-core is imported on first use,
# not whenever the platform is requested.
_MEGATRON_ON_CPU: dict[str, Any] = {
    # the tensor-parallel random tracker forks and restores CUDA generator states
    "tensor_parallel.random._get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
    "tensor_parallel.random._set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    "transformer.torch_norm.WrappedTorchNorm.__new__": _norm,
    # converts what it copies from a GPU but leaves host tensors as they are, which all-to-all does not accept
    "transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": _split_sizes,
    "transformer.moe.moe_utils.te_general_gemm": None,  # never defined without transformer-engine, but accessed
}


def _recomputation_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """torch leaves function modes while its backward runs; layers recomputed there need theirs restored."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    original = CheckpointFunction.backward

    def backward(ctx: Any, *gradients: Any) -> Any:
        with _CudaMeansCpu():
            return original(ctx, *gradients)

    return mock.patch.object(CheckpointFunction, "backward", staticmethod(backward))


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects `device="cuda"`, `.cuda()` and `.type() == "torch.cuda.…"` in megatron-core to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:  # checkpoint loading and random states call .cuda()
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers sort parameters and gradients by the name of their CUDA tensor type.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *(_to_cpu(arg) for arg in args[1:]))
        return func(*args, **kwargs)


def _to_cpu(device: Any) -> Any:
    name = device.type if isinstance(device, torch.device) else device
    return torch.device("cpu") if isinstance(name, str) and name.startswith("cuda") else device


def share_gloo_device() -> None:
    """Let all process groups of this process share one thread that waits for their sockets.

    torch gives each its own, and gloo's wakes a hundred times per second: the thirty groups of a student and a teacher
    take 15 % of a core from an idle rank (measured on two ranks; one thread: 1 %).
    """
    gloo: Any = dist.ProcessGroupGloo
    if hasattr(gloo.__init__, "trd_patched"):
        return
    original = gloo.__init__
    device = functools.cache(gloo.create_default_device)

    def init(self: Any, store: Any, rank: int, size: int, timeout: timedelta = default_pg_timeout) -> None:
        options = gloo._Options()
        options._devices, options._timeout = [device()], timeout
        original(self, store, rank, size, options)

    init.trd_patched = True  # type: ignore[attr-defined]
    gloo.__init__ = init


def patch_optimizers() -> None:
    """Let the optimizers load a checkpoint with plain torch Adam under them (no transformer-engine or Apex).

    torch Adam keeps `step` as a tensor in each parameter's state. The distributed optimizer's load path (1) looks for
    it among the saved sharded tensors, where it is not, and (2) puts one shared tensor into every state, which Adam
    then advances once per parameter. `FP32Optimizer` saves the common step, except when it is 0.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    if getattr(DistributedOptimizer, "_trd_patched", False):
        return

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step" and key in tensors:
                target.copy_(tensors[key])

    original = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state: Any) -> None:
        original(self, state)
        for entry in self.optimizer.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].detach().clone()

    load_plain = FP32Optimizer.load_state_dict

    def load_plain_state_dict(self: Any, state: Any) -> None:
        state["state"].setdefault("common_step", torch.tensor(0.0))
        load_plain(self, state)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    DistributedOptimizer.load_state_dict = load_state_dict
    FP32Optimizer.load_state_dict = load_plain_state_dict
    DistributedOptimizer._trd_patched = True
