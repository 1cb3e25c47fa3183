"""Low-rank adapters (LoRA, Hu et al. 2021) of a Megatron model's linear layers.

Each Hugging Face weight `W [out, in]` of such a layer has its own `A [rank, in]` and `B [out, rank]`, as in PEFT, whose
names they have on disk: the layer computes `x W' + scale * (x A') B'`. Megatron's fused layers (q, k, v; gate, up) have
one `Adapter` with a pair for each. Where tensor parallelism cuts a layer's outputs, it cuts B and replicates A; where
it cuts the inputs, it cuts A and replicates B.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import Tensor

from megatron_trd import platform
from megatron_trd.config import LoraConfig
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.loading import PiecewiseSource, Source, piecewise
from megatron_trd.models.weights import Kind, Piece, Slot, join, shard_shape, slots
from megatron_trd.parallel.grid import Grid

_SUFFIX = ".weight"
_SUFFIX_A, _SUFFIX_B = ".lora_A.weight", ".lora_B.weight"  # PEFT's
_PREFIX = "base_model.model."  # PEFT's

# A thread of its own may compute the teacher meanwhile.
_off: ContextVar[bool] = ContextVar("adapters are off", default=False)


@contextlib.contextmanager
def without_adapters() -> Iterator[None]:
    """Context in which this thread computes with a model's base weights alone."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


class _Pair(torch.nn.Module):
    """A and B of one weight: this rank's shards."""

    def __init__(self, a: Slot, b: Slot, arch: Architecture, grid: Grid, *, split: bool) -> None:
        """`split`: each tensor-parallel rank has a part of the sequence where activations are not cut otherwise."""
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        super().__init__()
        self._grid, self._cut = grid, {}
        for name, slot in (("a", a), ("b", b)):
            shape = shard_shape(slot, arch, grid.layout.tp)
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=platform.current().dtype))
            if slot.kind == "replicated":  # each rank has the gradient of its part of the sequence: Megatron sums them
                parameter.sequence_parallel = split  # type: ignore[attr-defined]
            else:
                self._cut[name] = 1 if slot.kind == "row" else 0
                set_tensor_model_parallel_attributes(parameter, True, self._cut[name], 1)
            self.register_parameter(name, parameter)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> Any:
        """What megatron-core saves and loads."""
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            self._cut,
            sharded_offsets,
            tp_group=self._grid.groups.tp,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class Adapter(torch.nn.Module):
    """The adapters of one Megatron linear layer: `[s, b, in]` -> what is added to its output, both sharded as its own
    input and output are."""

    def __init__(
        self, slot: Slot, linear: torch.nn.Module, arch: Architecture, grid: Grid, lora: LoraConfig, *, split: bool
    ) -> None:
        """`slot`: the layer's weight; `split`: sequence parallelism."""
        super().__init__()
        self._cuts_inputs, self._split, self._scale = slot.kind == "row", split, lora.scale
        self._tp, self._group = grid.layout.tp, grid.groups.tp
        # Rows of the parts alternate in the layer's output, as many times as there are groups of heads.
        self._groups = arch.kv_heads // self._tp if slot.kind == "qkv" else 1
        self._norm_eps, self._linear = arch.norm_eps, (linear,)  # a tuple: not one of this module's own parts
        of_tensors = zip(slot.hf, adapter_slots(arch, lora.rank)[slot], strict=True)
        self.pairs = torch.nn.ModuleDict(
            {_last(name): _Pair(*pair, arch, grid, split=split) for name, pair in of_tensors}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Both products of each pair; ranks exchange only what lies between them, `[s, b, rank]`."""
        norm = getattr(self._linear[0], "layer_norm_weight", None)
        if norm is not None:  # transformer-engine's layer normalises its input itself
            hidden = F.rms_norm(hidden, norm.shape, norm, self._norm_eps)
        pairs: list[Any] = list(self.pairs.values())
        low = F.linear(hidden, join([pair.a for pair in pairs])) * self._scale
        parts = self._exchanged(low).chunk(len(pairs), -1)
        found = [
            F.linear(part, pair.b).unflatten(-1, (self._groups, -1)) for part, pair in zip(parts, pairs, strict=True)
        ]
        return join(found, -1).flatten(-2)

    def _exchanged(self, low: Tensor) -> Tensor:
        """For ranks that have a part of the inputs each, their sum (of their part of the tokens, with sequence
        parallelism); for ranks that have a part of the outputs each, all tokens."""
        from megatron.core.tensor_parallel import mappings

        if self._tp == 1:
            return low
        whole = mappings.reduce_from_tensor_model_parallel_region, mappings.copy_to_tensor_model_parallel_region
        split = mappings.reduce_scatter_to_sequence_parallel_region, mappings.gather_from_sequence_parallel_region
        summed, gathered = split if self._split else whole
        exchanged: Tensor = (summed if self._cuts_inputs else gathered)(low, group=self._group)
        return exchanged

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """What megatron-core saves and loads."""
        found: dict[str, Any] = {}
        for name, pair in self.pairs.items():
            found |= pair.sharded_state_dict(f"{prefix}pairs.{name}.", sharded_offsets, metadata)  # type: ignore[operator]
        return found


def add_adapters(model: Any, arch: Architecture, grid: Grid, lora: LoraConfig, *, split: bool) -> None:
    """Give the linear layers of a `GPTModel`'s stage adapters without values yet, and freeze all else."""
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        for slot in _of_layer(arch):
            path = slot.megatron[0].removeprefix("decoder.layers.0.").removesuffix(_SUFFIX)
            parent, _, name = path.rpartition(".")
            linear = layer.get_submodule(path)
            adapter = Adapter(slot, linear, arch, grid, lora, split=split).to(platform.current().device)
            # Beside the layer, not in it: megatron-core's layers save all that is in them as their own shards.
            layer.get_submodule(parent).add_module(f"{name}_adapter", adapter)
            linear.register_forward_hook(functools.partial(_added, adapter))
    if grid.is_first_stage:
        model.embedding.register_forward_hook(_differentiable)


def _added(adapter: Adapter, _: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> Any:
    output, bias = outputs
    return (output, bias) if _off.get() else (output + adapter(inputs[0]), bias)


def _differentiable(_: torch.nn.Module, __: Any, hidden: Tensor) -> Tensor:
    """Layers that are recomputed in backward get there only through an input that requires a gradient."""
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def _of_layer(arch: Architecture) -> list[Slot]:
    """The weights of the first layer that have adapters; all layers are alike."""
    return [slot for slot in slots(arch) if slot.adaptable and slot.layer == 0]


def _last(name: str) -> str:
    """`self_attn.q_proj.weight` -> `q_proj`."""
    return name.removesuffix(_SUFFIX).rpartition(".")[2]


def targets(arch: Architecture) -> list[str]:
    """Last names of the Hugging Face modules that have adapters."""
    return [_last(name) for slot in _of_layer(arch) for name in slot.hf]


@functools.lru_cache(maxsize=8)
def adapter_slots(arch: Architecture, rank: int) -> Mapping[Slot, tuple[tuple[Slot, Slot], ...]]:
    """Slot of a weight with adapters -> A and B of each of its Hugging Face tensors."""
    return {
        slot: tuple(_pair(slot, index, rank) for index in range(len(slot.hf))) for slot in slots(arch) if slot.adaptable
    }


def all_adapter_slots(arch: Architecture, rank: int) -> list[Slot]:
    """All adapters of a model, in order."""
    return [slot for pairs in adapter_slots(arch, rank).values() for pair in pairs for slot in pair]


def _pair(slot: Slot, index: int, rank: int) -> tuple[Slot, Slot]:
    """Slots of A and B of one of a slot's tensors."""
    name, (outputs, inputs) = slot.hf[index], slot.shapes[index]
    cuts_inputs = slot.kind == "row"

    def of(matrix: str, suffix: str, shape: tuple[int, int], *, cut: bool) -> Slot:
        kind: Kind = ("row" if cuts_inputs else "column") if cut else "replicated"
        inside = f"_adapter.pairs.{_last(name)}.{matrix}"
        return replace(
            slot,
            megatron=(slot.megatron[0].removesuffix(_SUFFIX) + inside,),
            hf=(_PREFIX + name.removesuffix(_SUFFIX) + suffix,),
            shapes=(shape,),
            kind=kind,
            key=slot.key.removesuffix(_SUFFIX) + inside,
        )

    return (
        of("a", _SUFFIX_A, (rank, inputs), cut=cuts_inputs),
        of("b", _SUFFIX_B, (outputs, rank), cut=not cuts_inputs),
    )


def fresh(seed: int) -> Source:
    """New adapters, which change nothing yet: A uniform as in PEFT, B zero; the same at every layout."""

    def make(slot: Slot) -> list[Tensor]:
        [name], [shape] = slot.hf, slot.shapes
        if name.endswith(_SUFFIX_B):
            return [torch.zeros(shape)]
        of_name = int.from_bytes(blake3(f"{seed} {name}".encode()).digest(7))
        bound = shape[1] ** -0.5  # Kaiming's with a = sqrt(5)
        return [torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(of_name))]

    return make


@dataclass(frozen=True)
class _AdaptedPiece(Piece):
    """A part of a weight that its adapters are added to when it is read."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    dtype: torch.dtype

    def values(self) -> Tensor:
        """The sum in float32, rounded once to `dtype`."""
        rows = self.stored.reshape(-1, self.stored.shape[-1])
        part_of_b = self.b[self.row : self.row + len(rows)].float()
        part_of_a = self.a[:, self.column : self.column + rows.shape[1]].float()
        added = torch.addmm(rows.float(), part_of_b, part_of_a, alpha=self.scale)
        return added.to(self.dtype).view(self.stored.shape)


class AdaptedSource:
    """The weights `W + scale * B A` of a model with adapters; a `PiecewiseSource`. Collective if its sources are."""

    def __init__(
        self,
        base: Source | PiecewiseSource,
        adapters: Source,
        arch: Architecture,
        lora: LoraConfig,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: of the sums; None: that of the base weights, which may hide adapters of few steps."""
        self._dtype = dtype
        self._base, self._pieces, self._adapters = base, piecewise(base), adapters
        self._table, self._scale = adapter_slots(arch, lora.rank), lora.scale

    @torch.no_grad()
    def __call__(self, slot: Slot) -> list[Tensor]:
        if slot not in self._table:
            return self._base(slot)
        pieces = self.pieces(slot)  # so that both ways give the same bits
        stored = pieces[0].stored
        full = [stored.new_empty(shape, dtype=self._dtype or stored.dtype) for shape in slot.shapes]
        for piece in pieces:
            piece.copy_to(full[piece.index])
        return full

    def pieces(self, slot: Slot) -> list[Piece]:
        """The base weights' pieces, which are merged with the adapters when they are copied: an engine that needs few
        of them does no more."""
        pieces = self._pieces(slot)
        if slot not in self._table:
            return pieces
        pairs = [(self._adapters(a)[0], self._adapters(b)[0]) for a, b in self._table[slot]]
        return [
            _AdaptedPiece(
                piece.index,
                piece.row,
                piece.column,
                piece.stored,
                *pairs[piece.index],
                self._scale,
                self._dtype or piece.stored.dtype,
            )
            for piece in pieces
        ]
