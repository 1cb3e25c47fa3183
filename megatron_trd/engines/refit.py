"""Refit: the present Megatron weights into a running vLLM engine, and the proof that they arrived."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megatron_trd.models import loading
from megatron_trd.models.architecture import Architecture

# vLLM module name ending -> the Hugging Face modules fused in it, in row order. All others have the HF name.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PROBE_ROWS = 1024  # one-hot rows at once when a layer's weight is read back


def refit(llm: Any, arch: Architecture, source: loading.Source) -> None:
    """Load the full Hugging Face tensors of `source` into this rank's vLLM engine, one slot at a time. Collective."""
    tensors = loading.named_tensors(arch, source)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    for _ in tensors:  # vLLM may stop early; the other ranks of the gather do not
        pass
    if arch.tied:
        llm.apply_model(_renew_tied_head)


def _renew_tied_head(model: torch.nn.Module) -> None:
    """Runs in the vLLM worker. A tied head shares the embedding's tensor, which is new; but no tensor was loaded for
    the head itself, so a copy of it repacked for a kernel is still the old one (seen with vLLM 0.32 on a CPU)."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, torch.nn.Module) and hasattr(head, "quant_method"):
        quant_method: Any = head.quant_method  # vLLM's; torch declares every attribute of a module a tensor or module
        quant_method.process_weights_after_loading(head)


def checksum(tensor: Tensor) -> str:
    """Digest of a tensor's values as float32 bytes (exact for fp32, bf16 and fp16)."""
    data = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()


def verify(llm: Any, arch: Architecture, source: loading.Source) -> list[str]:
    """Names of the tensors whose checksum inside this rank's vLLM engine differs from Megatron's. Collective.

    Weights are read back through the layers themselves (a linear layer of one-hot rows gives its weight), so the check
    holds where vLLM has repacked them for its kernels.
    """
    [found] = llm.apply_model(_read_back)
    full = dict(loading.named_tensors(arch, source))
    if arch.tied:
        full["lm_head.weight"] = full["model.embed_tokens.weight"]
    different = []
    for module, (digests, rank, tp) in found.items():
        for part, digest in zip(_parts(module), digests, strict=True):
            if checksum(_engine_shard(part, full[part], rank, tp)) != digest:
                different.append(part)
    missing = set(full) - {part for module in found for part in _parts(module)}
    return sorted(different) + sorted(missing)


def _parts(module: str) -> list[str]:
    """Hugging Face tensor names held by a vLLM module."""
    parent, dot, last = module.rpartition(".")
    return [f"{parent}{dot}{name}.weight" for name in _FUSED.get(last, (last,))]


def _engine_shard(name: str, full: Tensor, rank: int, tp: int) -> Tensor:
    """The slice of a Hugging Face tensor that tensor-parallel rank `rank` of a vLLM engine holds."""
    if full.dim() == 1:
        return full
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return full.chunk(tp, 1)[rank]
    if "embed_tokens" in name or "lm_head" in name:
        return full  # compared whole: see _read_vocabulary
    return full.chunk(tp, 0)[rank]


def _read_back(model: torch.nn.Module) -> dict[str, tuple[list[str], int, int]]:
    """Runs in the vLLM worker: module name -> (checksums of its Hugging Face parts, tensor-parallel rank, size)."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    rank, tp = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    found: dict[str, tuple[list[str], int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            found[name] = ([checksum(_whole_vocabulary(module, _read_linear(module, module.embedding_dim)))], rank, tp)
        elif isinstance(module, VocabParallelEmbedding):
            found[name] = ([checksum(_whole_vocabulary(module, module.weight.data))], rank, tp)
        elif isinstance(module, LinearBase):
            sizes = getattr(module, "output_sizes", None)
            weight = _read_linear(module, module.input_size_per_partition)
            parts = weight.split([size // tp for size in sizes]) if sizes else [weight]
            found[name] = ([checksum(part) for part in parts], rank, tp)
        elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):  # norms
            found[name] = ([checksum(module.weight)], rank, tp)
    return found


def _read_linear(module: Any, size: int) -> Tensor:
    """`[out, in]` shard of a layer of `size` inputs, from its outputs for one-hot inputs: each is one weight."""
    weight = next(module.parameters())  # on a CPU an empty stand-in, whose device and dtype are right all the same
    columns = []
    for start in range(0, size, _PROBE_ROWS):
        one_hot = torch.zeros(min(_PROBE_ROWS, size - start), size, dtype=weight.dtype, device=weight.device)
        one_hot.diagonal(start).fill_(1)
        columns.append(module.quant_method.apply(module, one_hot))
    return torch.cat(columns).t()


def _whole_vocabulary(module: Any, part: Tensor) -> Tensor:
    """Embedding or head without padding, gathered over the engine's tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(part.contiguous(), dim=0)[: module.org_vocab_size]
