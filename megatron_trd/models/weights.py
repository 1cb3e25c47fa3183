"""The one Hugging Face <-> Megatron mapping: import, export, refit and teacher resharding all read this table.

A `Slot` is one Megatron parameter and the Hugging Face tensors it is made of. Its `kind` says how the tensors are laid
out in it and how tensor parallelism cuts it:

| kind         | Hugging Face tensors      | Megatron parameter                                                     |
|--------------|---------------------------|------------------------------------------------------------------------|
| `replicated` | one                       | the same on every rank                                                 |
| `row`        | `[out, in]`               | columns cut over ranks                                                 |
| `qkv`        | q, k, v                   | rows grouped by key/value head: (q of the group, k, v), groups cut     |
| `gated`      | gate, up                  | rank's rows of gate above rank's rows of up                            |
| `vocab`      | `[vocab, hidden]`         | rows padded with zeros to a multiple of the ranks, then cut            |

Sources: `transformers` modeling_qwen3.py and modeling_llama.py; megatron-core
`SelfAttention.get_query_key_value_tensors` and the `mlp.linear_fc1` gated layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.errors import UserError
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.parallel.grid import Grid

Kind = Literal["replicated", "row", "qkv", "gated", "vocab"]
Place = Literal["first", "layer", "last"]  # pipeline stage that holds the parameter


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter and the Hugging Face tensors it holds."""

    # Names the parameter may have: the local layer spec's, then the transformer-engine spec's, which fuses norms into
    # the next linear. Layer indices are global.
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors
    kind: Kind
    place: Place
    layer: int = 0  # global index, for place "layer"
    exported: bool = True  # False: a second copy of a tensor that another slot exports (tied head)


def slots(arch: Architecture) -> list[Slot]:
    """Every parameter of the model, in Hugging Face order (embedding, layers, final norm, head)."""
    hidden, vocab = arch.hidden_size, (arch.vocab_size, arch.hidden_size)
    embedding = "model.embed_tokens.weight"
    table = [Slot(("embedding.word_embeddings.weight",), (embedding,), (vocab,), "vocab", "first")]
    for layer in range(arch.layers):
        table += _layer_slots(arch, layer)
    table.append(Slot(("decoder.final_layernorm.weight",), ("model.norm.weight",), ((hidden,),), "replicated", "last"))
    head = embedding if arch.tied else "lm_head.weight"
    table.append(Slot(("output_layer.weight",), (head,), (vocab,), "vocab", "last", exported=not arch.tied))
    return table


def _layer_slots(arch: Architecture, layer: int) -> list[Slot]:
    hidden, ffn = arch.hidden_size, arch.ffn_size
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def slot(kind: Kind, megatron: Sequence[str], *hf: tuple[str, tuple[int, ...]]) -> Slot:
        names = tuple(f"decoder.layers.{layer}.{name}" for name in megatron)
        sources = tuple(f"model.layers.{layer}.{name}.weight" for name, _ in hf)
        return Slot(names, sources, tuple(shape for _, shape in hf), kind, "layer", layer)

    table = [
        slot(
            "replicated",
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("input_layernorm", (hidden,)),
        ),
        slot(
            "qkv",
            ("self_attention.linear_qkv.weight",),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        ),
    ]
    if arch.qk_norm:
        for x in "qk":
            name = f"self_attention.{x}_layernorm.weight"
            table.append(slot("replicated", (name,), (f"self_attn.{x}_norm", (arch.head_dim,))))
    return [
        *table,
        slot("row", ("self_attention.linear_proj.weight",), ("self_attn.o_proj", (hidden, queries))),
        slot(
            "replicated",
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            ("post_attention_layernorm", (hidden,)),
        ),
        slot(
            "gated",
            ("mlp.linear_fc1.weight",),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
        ),
        slot("row", ("mlp.linear_fc2.weight",), ("mlp.down_proj", (hidden, ffn))),
    ]


def shard(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    """Hugging Face tensors -> the Megatron shard of tensor-parallel rank `rank` of `tp`."""
    match slot.kind:
        case "replicated":
            return full[0]
        case "row":
            return full[0].chunk(tp, 1)[rank]
        case "gated":
            return torch.cat([part.chunk(tp, 0)[rank] for part in full])
        case "qkv":
            groups = torch.cat([part.view(arch.kv_heads, -1, arch.hidden_size) for part in full], dim=1)
            return groups.chunk(tp, 0)[rank].reshape(-1, arch.hidden_size)
        case "vocab":
            rows = arch.padded_vocab(tp) // tp
            part = full[0][rank * rows : (rank + 1) * rows]
            return torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0]))


def merge(slot: Slot, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
    """Megatron shards of all tensor-parallel ranks -> Hugging Face tensors; the inverse of `shard`."""
    match slot.kind:
        case "replicated":
            return [shards[0]]
        case "row":
            return [torch.cat(list(shards), dim=1)]
        case "gated":
            halves = [part.chunk(2) for part in shards]
            return [torch.cat([half[index] for half in halves]) for index in (0, 1)]
        case "qkv":
            groups = torch.cat(list(shards)).view(arch.kv_heads, -1, arch.hidden_size)
            sizes = [shape[0] // arch.kv_heads for shape in slot.shapes]
            return [part.reshape(-1, arch.hidden_size) for part in groups.split(sizes, dim=1)]
        case "vocab":
            return [torch.cat(list(shards))[: arch.vocab_size]]


def stage_of(slot: Slot, arch: Architecture, pp: int) -> int:
    """Pipeline stage that holds a slot."""
    return {"first": 0, "last": pp - 1, "layer": slot.layer // (arch.layers // pp)}[slot.place]


def local_parameters(model: torch.nn.Module, arch: Architecture, grid: Grid) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their Megatron name with global layer indices."""
    offset = grid.pp_rank * (arch.layers // grid.layout.pp)
    named = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if name.startswith("decoder.layers."):
            index, _, rest = name.removeprefix("decoder.layers.").partition(".")
            name = f"decoder.layers.{int(index) + offset}.{rest}"
        named[name] = parameter
    return named


def find(slot: Slot, named: dict[str, torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The parameter of a slot on this rank, under whichever layer spec it was built."""
    return next((named[name] for name in slot.megatron if name in named), None)


# Gives the full Hugging Face tensors of a slot; None for a slot this rank does not need.
Source = Callable[[Slot], list[Tensor]]


def folder_source(folder: ModelFolder) -> Source:
    """Read slots from a Hugging Face folder."""
    return lambda slot: [folder.tensor(name) for name in slot.hf]


def check_folder(folder: ModelFolder, arch: Architecture) -> None:
    """Raise `UserError` naming the first tensor that is missing or has the wrong shape. Reads file headers only."""
    for slot in slots(arch):
        for name, expected in zip(slot.hf, slot.shapes, strict=True):
            found = folder.shape(name)
            if found is None:
                raise UserError(f"model folder '{folder.path}': tensor {name} is missing; the download is not whole")
            if found != expected:
                raise UserError(
                    f"model folder '{folder.path}': tensor {name} has shape {list(found)}, "
                    f"config.json asks for {list(expected)}"
                )


@torch.no_grad()
def load(
    model: torch.nn.Module,
    arch: Architecture,
    grid: Grid,
    source: Source,
    *,
    decay: float = 0.0,
    all_slots: bool = False,
) -> None:
    """Fill this rank's parameters: `parameter <- decay * parameter + (1 - decay) * source`.

    `all_slots`: ask `source` for every slot in order, needed where it is collective; otherwise for local ones only.
    """
    named = local_parameters(model, arch, grid)
    for slot in slots(arch):
        parameter = find(slot, named)
        if parameter is None and not all_slots:
            continue
        full = source(slot)
        if parameter is None:
            continue
        part = shard(slot, full, arch, grid.tp_rank, grid.layout.tp).to(parameter)
        parameter.copy_(part) if decay == 0.0 else parameter.lerp_(part, 1.0 - decay)


def gathered_source(model: torch.nn.Module, arch: Architecture, grid: Grid) -> Source:
    """Full tensors of a running model, gathered over its grid. Collective: every rank asks for every slot in order."""
    named = local_parameters(model, arch, grid)
    table = slots(arch)

    def gather(slot: Slot) -> list[Tensor]:
        slot = slot if slot.exported else table[0]  # the tied head: its one tensor is the embedding
        return gather_slot(slot, find(slot, named), arch, grid)

    return gather


def gather_slot(slot: Slot, parameter: Tensor | None, arch: Architecture, grid: Grid) -> list[Tensor]:
    """Full tensors of one slot on every rank of the grid, from `parameter` on the stage that holds it. Collective."""
    stage = stage_of(slot, arch, grid.layout.pp)
    if grid.pp_rank == stage:
        assert parameter is not None, f"no parameter for {slot.hf} on stage {stage}"
        shards = _all_gather(parameter.detach(), grid.groups.tp, slot.kind)
        full = [tensor.contiguous() for tensor in merge(slot, shards, arch)]
    else:
        current = platform.current()
        full = [torch.empty(shape, dtype=current.dtype, device=current.device) for shape in slot.shapes]
    if grid.layout.pp > 1:
        for tensor in full:
            dist.broadcast(tensor, grid.stage_root(stage), group=grid.groups.pp)
    return full


def _all_gather(part: Tensor, group: Any, kind: Kind) -> list[Tensor]:
    if kind == "replicated" or group.size() == 1:
        return [part.clone()]  # the caller may keep what it gets while training changes the parameter
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def named_tensors(arch: Architecture, source: Source) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of the whole model, one slot at a time."""
    for slot in slots(arch):
        if slot.exported:
            yield from zip(slot.hf, source(slot), strict=True)
