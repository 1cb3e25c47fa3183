"""transformer-engine's layers without a GPU: its own Python, over torch in place of its compiled extension.

What is real: megatron-core's transformer-engine layers, transformer-engine's modules and autograd functions, their
parameters' names, how they add to `main_grad`, what they give to and take from other ranks. What is not: the dozen
products, norms and rotations of the extension that these layers call, here each a few lines of torch, and attention, of
which transformer-engine's own "unfused" implementation is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_trd import megatron_on_cpu, platform


def _torch_dtype(number: int) -> torch.dtype:
    constants: Any = sys.modules["transformer_engine.pytorch.constants"]
    return next(dtype for dtype, its in constants.TE_DType.items() if int(its) == int(number))


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor, accumulate: bool) -> None:
    """cuBLAS's order: `out (+)= op(b) @ op(a)`, summed in float32 at least."""
    wide = torch.promote_types(out.dtype, torch.float32)
    left, right = (tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (b, a))
    found = (left.t() if transb else left) @ (right.t() if transa else right)
    out.view(found.shape).copy_(out.view(found.shape).to(wide) + found if accumulate else found)


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    *_: Any,
    **options: Any,
) -> tuple[Any, ...]:
    assert (quantizer, gelu, options["comm_overlap"], options["alpha"]) == (None, False, None, 1.0)
    if out is None:
        rows = (b.shape[-1],) if transb else b.shape[:-1]
        columns = a.reshape(-1, a.shape[-1]).shape[0 if transa else 1]
        out = a.new_empty(*rows, columns, dtype=_torch_dtype(out_dtype) if out_dtype is not None else a.dtype)
    _product(a, transa, b, transb, out, accumulate)
    of_bias = None
    if bias is not None and grad:
        of_bias = b.reshape(-1, b.shape[-1]).sum(dim=0).to(bias.dtype)
    elif bias is not None:
        out += bias
    return out, of_bias, None, options["extra_output"]


def te_general_grouped_gemm(
    a: list[Tensor],
    transa: bool,
    b: list[Tensor],
    transb: bool,
    out: list[Tensor],
    out_dtype: int,
    splits: list[int],
    bias: list[Tensor],
    bias_dtype: int,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    *_: Any,
) -> list[Tensor]:
    outputs = out[0].split(splits) if single_output else out
    for left, right, into in zip(a, b, outputs, strict=True):
        _product(left, transa, right, transb, into, accumulate)
    return bias


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: None,
    dtype: int,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    assert (quantizer, zero_centered) == (None, False)
    inverse = (x.float().square().mean(dim=-1) + eps).rsqrt()
    found = (x.float() * inverse.unsqueeze(-1) * weight.float()).to(_torch_dtype(dtype))
    return found if out is None else out.copy_(found), None, inverse


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    normed = x.float() * inverse.unsqueeze(-1)
    of_normed = gradient.view(x.shape).float() * weight.float()
    of_x = inverse.unsqueeze(-1) * (of_normed - normed * (of_normed * normed).mean(dim=-1, keepdim=True))
    of_weight = (gradient.view(x.shape).float() * normed).reshape(-1, x.shape[-1]).sum(dim=0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def _rotate(x: Tensor, frequencies: Tensor, sign: int) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    angles = frequencies[: x.shape[0]].float()
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * angles.cos() + sign * rotated * angles.sin()).to(x.dtype)


def fused_rope_forward(x: Tensor, frequencies: Tensor, starts: None, layout: Any, interleaved: bool, *_: Any) -> Tensor:
    """`x [s, b, heads, d]`, `frequencies [s, 1, 1, d]`."""
    assert (starts, interleaved, frequencies.shape[-1]) == (None, False, x.shape[-1])
    return _rotate(x, frequencies, 1)


def fused_rope_backward(x: Tensor, frequencies: Tensor, *_: Any) -> Tensor:
    return _rotate(x, frequencies, -1)


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], each: bool) -> tuple[Tensor, None]:
    assert not each
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().unsqueeze(0), None


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float | Tensor) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    assert (decoupled, bias_correction) == (1, 1)
    for gradient, parameter, first, second in zip(*lists, strict=True):
        first.lerp_(gradient.float(), 1 - beta1)
        second.lerp_(gradient.float().square(), 1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt() + eps
        update = first / (1 - beta1**step) / denominator + weight_decay * parameter
        parameter.sub_(lr * update)


class _Named(type):
    """An enumeration of the extension's, which has every member that is asked for."""

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if type(value) is int}

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len(cls.__members__)
        setattr(cls, name, value)
        return value


class _Extension(types.ModuleType):
    """`transformer_engine_torch`: what is above, types that are only named, and functions that nobody may call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name}")

        value = _Named(name, (), {}) if name[0].isupper() else missing
        setattr(self, name, value)
        return value


def _asked_by_transformer_engine(depth: int) -> bool:
    return sys._getframe(depth).f_globals["__name__"].startswith("transformer_engine.")


class _AsOnAGpu(megatron_on_cpu._CudaMeansCpu):
    """... and tensors say to transformer-engine that they are on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_cuda.__get__ and _asked_by_transformer_engine(2):
            return True
        return super().__torch_function__(function, types, args, kwargs)


_GPU, _ANY = platform.CudaPlatform, platform.Platform


class TransformerEngineOnCpu(platform.CpuPlatform):
    """A GPU's platform in all that a CPU can do: its layers and optimizer, their settings, what ranks do not share."""

    length_multiple = _GPU.length_multiple
    threads_communicate = _GPU.threads_communicate
    layer_spec = _GPU.layer_spec
    sum_gradients_in_fp32 = _GPU.sum_gradients_in_fp32
    complete_optimizer = _ANY.complete_optimizer
    peers = _ANY.peers
    can_move = _ANY.can_move

    def set_up(self) -> None:
        with mock.patch.object(megatron_on_cpu, "patch_optimizers"):  # which is for torch's Adam
            super().set_up()

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        with mock.patch.object(megatron_on_cpu, "_CudaMeansCpu", _AsOnAGpu), super().megatron():
            yield

    def optimizer_config(self) -> dict[str, Any]:
        return self._in_dtype(_GPU.optimizer_config(self))  # type: ignore[arg-type]

    def transformer_config(self) -> dict[str, Any]:
        return self._in_dtype(_GPU.transformer_config(self))  # type: ignore[arg-type]

    def _in_dtype(self, of_a_gpu: dict[str, Any]) -> dict[str, Any]:
        return of_a_gpu | {"bf16": self.dtype == torch.bfloat16}


def _within_modes(backward: Any) -> Any:
    """torch leaves function modes while its backward runs."""

    @functools.wraps(backward)
    def wrapped(*arguments: Any) -> Any:
        with _AsOnAGpu():
            return backward(*arguments)

    return wrapped


def _extension() -> _Extension:
    extension: Any = _Extension("transformer_engine_torch")
    for function in (
        generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd, fused_rope_forward, fused_rope_backward,
        multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam,
    ):  # fmt: skip
        setattr(extension, function.__name__, function)
    # These are looked up by name with `import *`, and not called for layers with RMSNorm.
    extension.layernorm_fwd = extension.layernorm_bwd = None
    extension.get_cudnn_version = lambda: 91000
    extension.get_num_cublas_streams = lambda: 1
    return extension


def _import(folder: Path) -> None:
    """The package, less its own `__init__`, which looks for libraries, and its part for ONNX, which asks for others."""
    (about,) = importlib.metadata.distributions(name="transformer_engine", path=[str(folder)])
    package: Any = types.ModuleType("transformer_engine")
    package.__path__, package.__version__ = [str(folder / "transformer_engine")], about.version
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    sys.modules["transformer_engine"] = package
    sys.modules["transformer_engine_torch"] = _extension()
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = mock.MagicMock()
    importlib.import_module("transformer_engine.common").load_framework_extension = lambda _: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")


def install(folder: Path, dtype: torch.dtype) -> None:
    """In a process of its own that has not imported megatron-core: the package as pip puts it into `folder`, on a CPU
    that computes in `dtype`."""
    assert not any(name.startswith("megatron.core") for name in sys.modules)
    sys.path.insert(0, str(folder))
    os.environ.update(NVTE_PROJECT_BUILDING="1", NVTE_RELEASE_BUILD="0")  # no library is looked for
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="0")  # their kernels are a GPU's
    cuda: Any = torch.cuda
    cuda.is_available = lambda: _asked_by_transformer_engine(2)
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    cuda.stream = lambda _: contextlib.nullcontext()
    _import(folder)
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("transformer_engine."):
            function.backward = staticmethod(_within_modes(function.backward))  # type: ignore[assignment]
    TransformerEngineOnCpu.dtype = dtype
    platform.current = functools.cache(TransformerEngineOnCpu)  # type: ignore[assignment]
