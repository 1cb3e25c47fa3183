"""Changes to vLLM 0.32 on a CPU that a sampler in a training rank needs; used only by `platform`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

NORMS = {"rms_norm": ["cpp"], "fused_add_rms_norm": ["cpp"]}  # preferred implementations; see `_register_norms`
_VECTOR = 16  # values that the C++ normalisations process at a time
_PRIMITIVES = 32  # compiled products that a layer keeps, one per number of tokens: vLLM's own value


@contextlib.contextmanager
def starting(identifier: str) -> Iterator[None]:
    """Context in which an engine is created; `identifier` names its job and machine.

    vLLM's ranks on one machine communicate through shared memory named after its `init_method`: the same name for every
    job, never removed when a process is killed, so that the next job cannot start. Here each job and machine has its
    own name (ranks whose names differ use gloo), removed once all ranks have mapped it.
    """
    from vllm import _custom_ops
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher as Launcher

    _register_norms()
    original = Launcher._distributed_args

    def distributed_args(self: Any) -> tuple[str, int, int]:
        return f"file://{identifier}", *original(self)[1:]

    _custom_ops._supports_onednn = False  # its packed copies would replace the weights: see `pack_when_used`
    try:
        with mock.patch.object(Launcher, "_distributed_args", distributed_args):
            yield
    finally:
        for segment in Path("/dev/shm").glob(f"{identifier}-*cpushm_*"):
            segment.unlink(missing_ok=True)


@functools.cache
def _register_norms() -> None:
    """Register vLLM's own C++ normalisations, whose kernels a CPU build has but does not use.

    Instead it runs half a dozen tensor operations, which are meant to be fused by a compiler.
    """
    from vllm import ir

    def takes(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
        same = weight is not None and weight.dtype == x.dtype
        return same and variance_size is None and x.shape[-1] % _VECTOR == 0

    def takes_plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        return takes(x, weight, variance_size)

    def takes_fused(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return takes(x, weight, variance_size) and x.is_contiguous() and x_residual.is_contiguous()

    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        x = x.contiguous()  # heads of queries and keys are slices
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, weight, epsilon)
        return output

    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    ir.ops.rms_norm.register_impl("cpp", supports_args=takes_plain)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl("cpp", supports_args=takes_fused, inplace=True)(fused_add_rms_norm)


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Before a reload: experts are packed for their kernel only when it is created, and weights reloaded later would be
    mistaken for packed ones."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def pack_when_used(model: torch.nn.Module) -> None:
    """After a reload: linear layers pack their new weights at their first use."""
    from vllm import _custom_ops

    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = _PackedLinear(_custom_ops)  # type: ignore[assignment]


class _PackedLinear:
    """A linear layer computed by oneDNN from a packed copy of its weights.

    For the few tokens of a decoding step this takes half to a third of the time of torch's product. The copy, which
    takes as long as about ten such steps save, is made when the layer is first used after a refit.
    """

    def __init__(self, operations: Any) -> None:
        self._operations = operations  # vllm._custom_ops
        self._packed: Any = None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._packed is None:
            self._packed = self._operations.create_onednn_mm(weight.t(), _PRIMITIVES)
        product: torch.Tensor = self._operations.onednn_mm(self._packed, x, bias)
        return product


def expert_weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `Platform.expert_weights`, for packed experts.

    Packing moves the elements of each expert's matrix in the same way. Their destinations are read from a matrix of
    indices, packed in two halves that float32 holds exactly. Packed matrices are padded as the kernel requires.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import cpu_prepack_moe_weight

    isa = module.quant_method.moe_kernel.fused_experts.isa

    def plain(packed: torch.Tensor) -> torch.Tensor:
        index = torch.arange(packed[0].numel()).view(1, *packed.shape[1:])
        low, high = (
            cpu_prepack_moe_weight(half.float(), isa).flatten().long() for half in (index & 0xFFFF, index >> 16)
        )
        found = torch.empty_like(packed.flatten(1))
        found[:, low | high << 16] = packed.flatten(1)
        return found.view(packed.shape)

    gate_up, down = plain(module.w13_weight.data), plain(module.w2_weight.data)
    size = module.moe_config.intermediate_size_per_partition
    halves = gate_up.view(len(gate_up), 2, -1, gate_up.shape[-1])[:, :, :size]
    return halves.flatten(1, 2), down[..., :size]
