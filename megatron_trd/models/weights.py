"""The one Hugging Face <-> Megatron mapping: import, export, refit and teacher resharding all read these tables.

A family's table has a `Row` for each Megatron parameter of a layer: its names, the Hugging Face tensors it is made of,
and its `kind`, which says how the tensors are laid out in it and how tensor parallelism cuts it:

| kind         | Hugging Face tensors      | Megatron parameter                                                     |
|--------------|---------------------------|------------------------------------------------------------------------|
| `replicated` | one                       | the same on every rank                                                 |
| `row`        | `[out, in]`               | columns cut over ranks                                                 |
| `column`     | `[out, in]`               | rows cut over ranks (adapters only: `models/lora.py`)                  |
| `qkv`        | q, k, v                   | rows grouped by key/value head: (q of the group, k, v), groups cut     |
| `gated`      | gate, up                  | rank's rows of gate above rank's rows of up                            |
| `vocab`      | `[vocab, hidden]`         | rows padded with zeros to a multiple of the ranks, then cut            |

`slots(arch)` is the table filled in for one model. Sources: `transformers` modeling_qwen2.py, modeling_qwen3.py,
modeling_qwen3_moe.py and modeling_llama.py; megatron-core `SelfAttention.get_query_key_value_tensors`, the
`mlp.linear_fc1` gated layout and `apply_swiglu_sharded_factory`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_trd.models.architecture import Architecture

Kind = Literal["replicated", "row", "column", "qkv", "gated", "vocab"]
Place = Literal["first", "layer", "last"]  # pipeline stage that holds the parameter
# Sizes of an architecture that the tables name; `size_of` gives their value.
Dim = Literal["hidden", "queries", "keys", "head_dim", "ffn", "experts", "expert_ffn"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter of a layer, in a family's table. `{expert}` in a name stands for an expert's index."""

    kind: Kind
    # Names the parameter may have: the local layer spec's, then the transformer-engine spec's, which fuses norms into
    # the next linear. The last is its name in distributed checkpoints too, unless `key` says otherwise.
    megatron: tuple[str, ...]
    hf: Mapping[str, tuple[Dim, ...]]  # Hugging Face name -> shape
    key: str = ""

    @property
    def of_expert(self) -> bool:
        """Whether each expert of the layer has one."""
        return "{expert}" in self.megatron[0]


@dataclass(frozen=True)
class Family:
    """A model family: the rows of one decoder layer."""

    layer: tuple[Row, ...]

    def has(self, name: str) -> bool:
        """Whether a layer has a parameter of this Megatron name."""
        return any(name in row.megatron for row in self.layer)


_HEADS = (
    Row(
        "replicated",
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": ("hidden",)},
    ),
    Row(
        "qkv",
        ("self_attention.linear_qkv.weight",),
        {
            "self_attn.q_proj.weight": ("queries", "hidden"),
            "self_attn.k_proj.weight": ("keys", "hidden"),
            "self_attn.v_proj.weight": ("keys", "hidden"),
        },
    ),
    Row("row", ("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": ("hidden", "queries")}),
)
_QKV_BIAS = (
    Row(
        "qkv",
        ("self_attention.linear_qkv.bias",),
        {
            "self_attn.q_proj.bias": ("queries",),
            "self_attn.k_proj.bias": ("keys",),
            "self_attn.v_proj.bias": ("keys",),
        },
    ),
)
_QK_NORM = (
    Row("replicated", ("self_attention.q_layernorm.weight",), {"self_attn.q_norm.weight": ("head_dim",)}),
    Row("replicated", ("self_attention.k_layernorm.weight",), {"self_attn.k_norm.weight": ("head_dim",)}),
)
_FEED_FORWARD = (
    Row(
        "replicated",
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": ("hidden",)},
    ),
    Row(
        "gated",
        ("mlp.linear_fc1.weight",),
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    Row("row", ("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": ("hidden", "ffn")}),
)
_EXPERTS = (
    Row("replicated", ("pre_mlp_layernorm.weight",), {"post_attention_layernorm.weight": ("hidden",)}),
    Row("replicated", ("mlp.router.weight",), {"mlp.gate.weight": ("experts", "hidden")}),
    Row(
        "gated",
        ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
        {
            "mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            "mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        key="mlp.experts.experts.linear_fc1.weight",
    ),
    Row(
        "row",
        ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
        {"mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
        key="mlp.experts.experts.linear_fc2.weight",
    ),
)

# Hugging Face architecture -> its table. docs/checkpoints.md says how to add one.
FAMILIES = {
    "Qwen3ForCausalLM": Family((*_HEADS, *_QK_NORM, *_FEED_FORWARD)),
    "Qwen3MoeForCausalLM": Family((*_HEADS, *_QK_NORM, *_EXPERTS)),
    "Qwen2ForCausalLM": Family((*_HEADS, *_QKV_BIAS, *_FEED_FORWARD)),
    "LlamaForCausalLM": Family((*_HEADS, *_FEED_FORWARD)),  # Llama 3, SmolLM2
}


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter and the Hugging Face tensors it holds."""

    megatron: tuple[str, ...]  # names it may have (see `Row`), with global layer and expert indices
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors
    kind: Kind
    place: Place
    key: str  # of the stacked tensor in distributed checkpoints, of which it is one layer or expert
    stack: tuple[int, ...] = ()  # sizes of the stacked axes: layers, experts
    index: tuple[int, ...] = ()  # its position on them
    exported: bool = True  # False: a second copy of a tensor that another slot exports (tied head)

    @property
    def layer(self) -> int:
        """Global index of its decoder layer."""
        return self.index[0]

    @property
    def expert(self) -> int | None:
        """Global index of the expert it belongs to."""
        return self.index[1] if len(self.index) > 1 else None

    @property
    def adaptable(self) -> bool:
        """Whether low-rank adapters can be added to it: a matrix that tensor parallelism cuts, but no expert's."""
        return self.kind in ("row", "qkv", "gated") and len(self.whole) == 2 and self.expert is None

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the parameter without tensor parallelism, and without padding of the vocabulary."""
        return sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]

    @property
    def size(self) -> int:
        """Number of values in it, and in its Hugging Face tensors together."""
        return math.prod(self.whole)


@functools.lru_cache(maxsize=8)  # a refit calls it twice
def slots(arch: Architecture) -> tuple[Slot, ...]:
    """Every parameter of the model, in Hugging Face order (embedding, layers, final norm, head)."""
    hidden, vocab = arch.hidden_size, (arch.vocab_size, arch.hidden_size)
    embedding, source = "embedding.word_embeddings.weight", "model.embed_tokens.weight"
    norm, output = "decoder.final_layernorm.weight", "output_layer.weight"
    table = [Slot((embedding,), (source,), (vocab,), "vocab", "first", embedding)]
    for layer in range(arch.layers):
        table += _layer_slots(arch, layer)
    table.append(Slot((norm,), ("model.norm.weight",), ((hidden,),), "replicated", "last", norm))
    head = source if arch.tied else "lm_head.weight"
    table.append(Slot((output,), (head,), (vocab,), "vocab", "last", output, exported=not arch.tied))
    return tuple(table)


def exported_slots(arch: Architecture) -> tuple[Slot, ...]:
    """`slots`, each Hugging Face tensor once: without the second copy of a tied head."""
    return tuple(slot for slot in slots(arch) if slot.exported)


def _layer_slots(arch: Architecture, layer: int) -> list[Slot]:
    rows = FAMILIES[arch.family].layer
    sizes = arch.sizes()

    def slot(row: Row, expert: int | None = None) -> Slot:
        megatron = tuple(f"decoder.layers.{layer}.{name.format(expert=expert)}" for name in row.megatron)
        hf = tuple(f"model.layers.{layer}.{name.format(expert=expert)}" for name in row.hf)
        shapes = tuple(tuple(sizes[dim] for dim in dims) for dims in row.hf.values())
        key = f"decoder.layers.{row.key or row.megatron[-1]}"
        stack, index = ((arch.layers,), (layer,)) if expert is None else ((arch.layers, arch.experts), (layer, expert))
        return Slot(megatron, hf, shapes, row.kind, "layer", key, stack, index)

    shared = [slot(row) for row in rows if not row.of_expert]
    return shared + [slot(row, expert) for expert in range(arch.experts) for row in rows if row.of_expert]


def parts(slot: Slot, arch: Architecture, rank: int, tp: int) -> list[tuple[int, int, int]]:
    """Rows of the Megatron shard of tensor-parallel rank `rank` of `tp`, in order, without a vocabulary's padding:
    (which Hugging Face tensor, its first row, number of rows)."""
    match slot.kind:
        case "replicated" | "row":
            return [(0, 0, slot.shapes[0][0])]
        case "column" | "gated":
            rows = slot.shapes[0][0] // tp
            return [(part, rank * rows, rows) for part in range(len(slot.hf))]
        case "qkv":
            sizes, groups = _group_rows(slot, arch), arch.kv_heads // tp
            return [
                (part, group * size, size)
                for group in range(rank * groups, (rank + 1) * groups)
                for part, size in enumerate(sizes)
            ]
        case "vocab":
            rows = arch.padded_vocab(tp) // tp
            return [(0, min(rank * rows, arch.vocab_size), max(0, min(rows, arch.vocab_size - rank * rows)))]


def shard_shape(slot: Slot, arch: Architecture, tp: int) -> torch.Size:
    """Shape of the Megatron shard on each of `tp` tensor-parallel ranks."""
    rows, *rest = slot.whole
    match slot.kind:
        case "replicated":
            return torch.Size([rows, *rest])
        case "row":
            return torch.Size([rows, rest[0] // tp])
        case "vocab":
            rows = arch.padded_vocab(tp)
    return torch.Size([rows // tp, *rest])


def shard(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    """Hugging Face tensors -> the Megatron shard of tensor-parallel rank `rank` of `tp`."""
    rows = join([full[part][start : start + count] for part, start, count in parts(slot, arch, rank, tp)])
    match slot.kind:
        case "row":
            return rows.chunk(tp, 1)[rank]
        case "vocab":
            return torch.nn.functional.pad(rows, (0, 0, 0, arch.padded_vocab(tp) // tp - len(rows)))
        case _:
            return rows


@dataclass(frozen=True)
class Piece:
    """A part of one of a slot's Hugging Face tensors."""

    index: int  # of the tensor
    row: int  # where it begins in the tensor
    column: int
    stored: Tensor  # one dimension more than the tensor has means rows by group, the groups not adjacent

    def values(self) -> Tensor:
        """Its values, shaped as they are stored."""
        return self.stored

    def copy_to(self, window: Tensor, row: int = 0, column: int = 0) -> int:
        """Copy the values within a window of the tensor that begins at (row, column); returns their number.

        The window of a piece with groups must contain whole groups.
        """
        shape, begins, ats = self.stored.shape, [self.row, self.column], [row, column]
        if len(shape) > window.dim():
            window = window.unflatten(0, (-1, shape[1]))
            begins, ats = [self.row // shape[1]], [row // shape[1]]
        kept: list[tuple[int, int, int]] = []  # dimension, first, count: of the values
        for dim, (begin, at) in enumerate(zip(begins[: len(shape)], ats, strict=False)):
            first = max(begin, at)
            count = min(begin + shape[dim], at + window.shape[dim]) - first
            if count <= 0:
                return 0
            kept.append((dim, first - begin, count))
            window = window.narrow(dim, first - at, count)
        values = self.values()
        for where in kept:
            values = values.narrow(*where)
        window.copy_(values)
        return values.numel()


def pieces(slot: Slot, part: Tensor, arch: Architecture, rank: int, tp: int) -> Iterator[Piece]:
    """Pieces of a slot's Hugging Face tensors in the Megatron shard of tensor-parallel rank `rank` of `tp`; views."""
    match slot.kind:
        case "row":
            yield Piece(0, 0, rank * part.shape[1], part)
        case "qkv":  # a group's q, k and v rows are consecutive; one copy of each covers all groups
            sizes, groups = _group_rows(slot, arch), arch.kv_heads // tp
            by_group = part.unflatten(0, (groups, sum(sizes))).split(sizes, 1)
            for index, (size, values) in enumerate(zip(sizes, by_group, strict=True)):
                yield Piece(index, rank * groups * size, 0, values)
        case _:
            row = 0
            for index, start, count in parts(slot, arch, rank, tp):
                yield Piece(index, start, 0, part[row : row + count])
                row += count


def _group_rows(slot: Slot, arch: Architecture) -> list[int]:
    """Rows of q, k and v in a group of heads that share keys and values."""
    return [shape[0] // arch.kv_heads for shape in slot.shapes]


def uncut(full: Sequence[Tensor]) -> list[Piece]:
    """A slot's Hugging Face tensors, each as one piece."""
    return [Piece(index, 0, 0, values) for index, values in enumerate(full)]


def merge(slot: Slot, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
    """Megatron shards of all tensor-parallel ranks -> Hugging Face tensors; the inverse of `shard`."""
    if len(slot.hf) == 1 and (len(shards) == 1 or slot.kind == "replicated"):
        return [shards[0][: slot.shapes[0][0]]]  # no copy
    full = [shards[0].new_empty(shape) for shape in slot.shapes]
    for rank, part in enumerate(shards):
        for piece in pieces(slot, part, arch, rank, len(shards)):
            piece.copy_to(full[piece.index])
    return full


def join(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate; a single piece is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def stage_of(slot: Slot, arch: Architecture, pp: int) -> int:
    """Pipeline stage that holds a slot."""
    match slot.place:
        case "first":
            return 0
        case "last":
            return pp - 1
        case "layer":
            return slot.layer // (arch.layers // pp)
