"""Refit: loads the current Megatron weights into a running vLLM engine and verifies that they arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from megatron_trd import platform
from megatron_trd.models import loading, weights
from megatron_trd.models.architecture import Architecture

# vLLM module name ending -> the Hugging Face modules fused in it, in row order. All others have the HF name.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PROBE_ROWS = 1024  # one-hot rows at once when a layer's weight is read back


def refit(llm: Any, arch: Architecture, source: loading.Source) -> int:
    """Load the full Hugging Face tensors of `source` into this rank's vLLM engine; returns their bytes. Collective.

    For a dense model, each part is copied once, directly into the engine's parameter. Kernels for experts need repacked
    weights, which vLLM's loader provides at a fraction of the speed. Raises `RuntimeError` if the engine has parameters
    that the model lacks.
    """
    table = weights.exported_slots(arch)
    if arch.experts:
        remaining = loading.named_tensors(arch, source)
        llm.apply_model(platform.current().prepare_reload)
    else:
        [engine] = llm.apply_model(_engine)
        pieces = loading.piecewise(source)
        remaining = (_filled(slot, pieces(slot), engine, arch) for slot in table)
        if missed := engine.parameters.keys() - {_engine_name(slot) for slot in table}:
            raise RuntimeError(f"the engine has parameters that no refit reaches: {', '.join(sorted(missed))}")
    how = {"weights_iterator": remaining, "is_checkpoint_format": arch.experts > 0}
    with torch.no_grad():  # for the worker, which is in this thread: some of vLLM's parameters require gradients
        llm.collective_rpc("reload_weights", kwargs=how)
        for _ in remaining:  # vLLM may stop early; the other ranks of an exchange do not
            pass
    llm.apply_model(platform.current().finish_reload)
    return sum(slot.size for slot in table) * platform.current().dtype.itemsize


@dataclass(frozen=True)
class _Engine:
    """An engine's worker: its parameters by name, and its tensor-parallel rank and size."""

    parameters: dict[str, torch.nn.Parameter]
    rank: int
    tp: int


def _engine(model: torch.nn.Module) -> _Engine:
    """Runs in the vLLM worker, which is in this process."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, tp = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return _Engine(dict(model.named_parameters()), rank, tp)


def _filled(
    slot: weights.Slot, pieces: Sequence[weights.Piece], engine: _Engine, arch: Architecture
) -> tuple[str, Tensor]:
    """vLLM's name of a dense slot's parameter, and the parameter with its part of the slot's tensors in it.

    vLLM then copies the parameter onto itself, a no-op. Given the tensors, it would have to concatenate those that it
    fuses first, copying them twice. Raises `RuntimeError` if the pieces do not fill the parameter.
    """
    name = _engine_name(slot)
    parameter = engine.parameters[name]
    filled: Tensor = parameter
    column = 0
    rows = [(0, shape[0]) for shape in slot.shapes]  # this rank's rows of each tensor: first and count
    match slot.kind:
        case "row":
            column = engine.rank * parameter.shape[1]
        case "vocab":
            first = engine.rank * len(parameter)
            rows = [(first, max(0, min(len(parameter), arch.vocab_size - first)))]
            filled = parameter[: rows[0][1]]
            parameter[rows[0][1] :].zero_()  # padding
        case "qkv" | "gated":
            rows = [(engine.rank * (size // engine.tp), size // engine.tp) for _, size in rows]
    windows = filled.split([size for _, size in rows])
    copied = sum(piece.copy_to(windows[piece.index], rows[piece.index][0], column) for piece in pieces)
    if copied != filled.numel():
        raise RuntimeError(f"{name}: {filled.numel()} values in the engine, {copied} of them refitted")
    return name, parameter


def _engine_name(slot: weights.Slot) -> str:
    """vLLM's name of a dense slot's parameter."""
    last = slot.hf[0].split(".")[-2]
    fused = next((name for name, parts in _FUSED.items() if last in parts), last)
    return slot.hf[0].replace(f".{last}.", f".{fused}.")


def checksum(tensor: Tensor) -> str:
    """Digest of a tensor's values as float32 bytes (exact for fp32, bf16 and fp16)."""
    data = tensor.detach().to("cpu", torch.float32).flatten() + 0.0  # -0.0 counts as 0.0, as it does in sums
    return blake3(data.view(torch.uint8).numpy().data).hexdigest()


@torch.no_grad()
def verify(llm: Any, arch: Architecture, source: loading.Source) -> dict[str, bool]:
    """For every tensor, whether its checksum inside this rank's vLLM engine equals Megatron's. Collective.

    Weights are read back through the layers themselves (a linear layer applied to one-hot rows gives its weight), so
    the check also holds where vLLM has repacked them for its kernels.
    """
    [read] = llm.apply_model(_read_back)
    found, rank, tp = read
    kinds = {name: slot.kind for slot in weights.slots(arch) for name in slot.hf}
    same: dict[str, bool] = {}
    for name, full in loading.named_tensors(arch, source):
        names = [name, "lm_head.weight"] if arch.tied and name == weights.slots(arch)[0].hf[0] else [name]
        # A separate teacher may have another dtype on disk than in the engine, which uses the platform's.
        expected = checksum(_engine_shard(full, kinds[name], rank, tp).to(platform.current().dtype))
        same |= {copy: found.get(copy) == expected for copy in names}
    return same


def _parts(module: str, parameter: str) -> list[str]:
    """Hugging Face tensor names held by a parameter of a vLLM module."""
    parent, dot, last = module.rpartition(".")
    return [f"{parent}{dot}{name}.{parameter}" for name in _FUSED.get(last, (last,))]


def _engine_shard(full: Tensor, kind: weights.Kind, rank: int, tp: int) -> Tensor:
    """The slice of a Hugging Face tensor that tensor-parallel rank `rank` of a vLLM engine holds."""
    match kind:
        case "replicated" | "vocab":  # the vocabulary is compared whole: see _whole_vocabulary
            return full
        case "row":
            return full.chunk(tp, 1)[rank]
        case _:
            return full.chunk(tp, 0)[rank]


def _read_back(model: torch.nn.Module) -> tuple[dict[str, str], int, int]:
    """Runs in the vLLM worker: Hugging Face name -> checksum of this rank's part; tensor-parallel rank and size."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    rank, tp = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            whole = _whole_vocabulary(module, _read_linear(module, module.embedding_dim))
            found[f"{name}.weight"] = checksum(whole)
        elif isinstance(module, VocabParallelEmbedding):
            found[f"{name}.weight"] = checksum(_whole_vocabulary(module, module.weight.data))
        elif isinstance(module, RoutedExperts):
            found |= _read_experts(name.removesuffix(".routed_experts"), module)
        elif isinstance(module, LinearBase):
            inputs: int = getattr(module, "input_size_per_partition", module.input_size)  # absent if it is not sharded
            read = {"weight": _read_linear(module, inputs), "bias": module.bias}
            sizes = [size // tp for size in getattr(module, "output_sizes", [])]
            for parameter, tensor in read.items():
                if tensor is not None:
                    parts = tensor.split(sizes) if sizes else [tensor]
                    found |= dict(zip(_parts(name, parameter), map(checksum, parts), strict=True))
        elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):  # norms
            found[f"{name}.weight"] = checksum(module.weight)
    return found, rank, tp


def _read_experts(name: str, module: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for expert, (gate_up, down) in enumerate(zip(*platform.current().expert_weights(module), strict=True)):
        gate, up = gate_up.chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        found |= {f"{name}.{expert}.{part}.weight": checksum(tensor) for part, tensor in parts.items()}
    return found


def _read_linear(module: Any, size: int) -> Tensor:
    """`[out, in]` shard of a layer with `size` inputs, read from its outputs for one-hot inputs: each is one weight."""
    weight = next(module.parameters())  # on a CPU an empty placeholder with the right device and dtype
    found = weight.new_empty(0, size)
    for start in range(0, size, _PROBE_ROWS):
        one_hot = torch.zeros(min(_PROBE_ROWS, size - start), size, dtype=weight.dtype, device=weight.device)
        one_hot.diagonal(start).fill_(1)
        columns = module.quant_method.apply(module, one_hot).t()
        if not len(found):
            found = columns.new_empty(len(columns), size)
        found[:, start : start + len(one_hot)] = columns
    platform.current().finish_reload(module)  # drops what the layer built for this read, as if it had not been used
    return found


def _whole_vocabulary(module: Any, part: Tensor) -> Tensor:
    """Embedding or head without padding, gathered over the engine's tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(part.contiguous(), dim=0)[: module.org_vocab_size]
