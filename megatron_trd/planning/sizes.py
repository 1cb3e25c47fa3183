"""Size and cost of a model: parameters and adapters of a rank, products per token, values kept for backward."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megatron_trd.models.architecture import Architecture
from megatron_trd.models.lora import all_adapter_slots
from megatron_trd.models.weights import Slot, shard_shape, slots
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning.devices import Stack

KV_BLOCK = 16  # tokens; vLLM's default on GPUs


@dataclass(frozen=True)
class Parameters:
    """Number of parameters, with experts counted separately: they have their own replicas and optimizer shards."""

    shared: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.shared + self.experts


@functools.cache
def one_layer(arch: Architecture) -> tuple[Slot, ...]:
    """The model's table of parameters with a single layer: all layers are alike."""
    return tuple(slots(replace(arch, layers=1)))


@functools.cache
def whole(arch: Architecture) -> Parameters:
    """The model's parameters, each counted once and without padding."""
    table = [slot for slot in one_layer(arch) if slot.exported]
    layer = [slot for slot in table if slot.place == "layer"]
    ends = _values(slot.whole for slot in table if slot.place != "layer")
    return Parameters(
        ends + arch.layers * _values(slot.whole for slot in layer if slot.expert is None),
        arch.layers * _values(slot.whole for slot in layer if slot.expert is not None),
    )


@functools.cache
def of_rank(arch: Architecture, layout: Layout, stage: int, *, with_head: bool) -> Parameters:
    """Parameters that a rank of a pipeline stage holds, including padding of the vocabulary.

    A tied head is the embedding if both are on one stage, and otherwise a second copy. `with_head=False` is for a
    teacher, whose head is with the loss (see `head_shard`).
    """
    shared = experts = 0
    layers = arch.layers // layout.pp
    for slot in one_layer(arch):
        if slot.expert is not None:
            experts += layers * _values([slot.whole])
        elif slot.place == "layer":
            shared += layers * _values([shard_shape(slot, arch, layout.tp)])
        elif _is_on(slot, arch, layout, stage, with_head):
            shared += _values([shard_shape(slot, arch, layout.tp)])
    return Parameters(shared, experts // layout.ep)


def _is_on(slot: Slot, arch: Architecture, layout: Layout, stage: int, with_head: bool) -> bool:
    """Whether a stage holds a parameter that does not belong to a layer."""
    is_head = slot.place == "last" and slot.kind == "vocab"
    if is_head and (not with_head or (arch.tied and layout.pp == 1)):
        return False
    return stage == (0 if slot.place == "first" else layout.pp - 1)


def head_shard(arch: Architecture, tp: int) -> int:
    """Values of an output head's shard over `tp` ranks."""
    return arch.padded_vocab(tp) // tp * arch.hidden_size


@functools.cache
def adapted(arch: Architecture) -> tuple[Slot, ...]:
    """A layer's parameters that low-rank adapters are added to."""
    return tuple(slot for slot in one_layer(arch) if slot.adaptable)


@functools.cache
def adapters_of_layer(arch: Architecture, rank: int, tp: int) -> int:
    """Values of a layer's adapters of rank `rank` on each of `tp` tensor-parallel ranks."""
    layer = all_adapter_slots(replace(arch, layers=1), rank)
    return _values(shard_shape(slot, arch, tp) for slot in layer)


def engine_parameters(arch: Architecture, tp: int) -> float:
    """Parameters on each of the `tp` ranks of a vLLM engine, which shards experts too."""
    return whole(arch).total / tp


@functools.cache
def products_per_token(arch: Architecture) -> Parameters:
    """Parameters of all layers that multiply a token: matrices, including those of the experts it is sent to."""
    layer = [slot for slot in one_layer(arch) if slot.place == "layer" and len(slot.whole) > 1]
    shared = _values(slot.whole for slot in layer if slot.expert is None)
    experts = _values(slot.whole for slot in layer if slot.expert is not None)
    chosen = experts * arch.experts_per_token // arch.experts if arch.experts else 0
    return Parameters(arch.layers * shared, arch.layers * chosen)


def forward_flops(
    arch: Architecture, length: float, stack: Stack, *, tp: int = 1, sequence_parallel: bool = True
) -> float:
    """FLOPs of all layers for one sequence on each of `tp` ranks: products with the weights, and attention's two with
    each other token. Experts are not sharded: without sequence parallelism every rank sends all tokens to them."""
    pairs = length * length * (0.5 if stack.tiled_attention else 1.0)
    attention = 4 * arch.sizes()["queries"] * pairs * arch.layers
    return attention / tp + weight_flops(arch, length, tp=tp, sequence_parallel=sequence_parallel)


def weight_flops(arch: Architecture, length: float, *, tp: int = 1, sequence_parallel: bool = True) -> float:
    """The part of `forward_flops` in products with weights."""
    products = products_per_token(arch)
    return 2 * length * (products.shared / tp + products.experts / (tp if sequence_parallel else 1))


def adapter_flops(arch: Architecture, length: float, rank: int, tp: int) -> float:
    """FLOPs of all layers' adapters for one sequence, forward, on each of `tp` ranks: each multiplies every token by
    all that it holds of them."""
    return 2 * length * adapters_of_layer(arch, rank, tp) * arch.layers


def kv_bytes(arch: Architecture, tokens: float, tp: int, stack: Stack) -> float:
    """Keys and values of a sequence on each of an engine's `tp` ranks: whole blocks of every layer."""
    blocks = -(-int(tokens) // KV_BLOCK)
    return blocks * KV_BLOCK * 2 * arch.layers * (arch.sizes()["keys"] // tp) * stack.weight_bytes


def kept_by_layer(
    arch: Architecture, layout: Layout, length: int, stack: Stack, *, sequence_parallel: bool, adapter_rank: int = 0
) -> float:
    """Bytes per token that a layer keeps on a rank for backward, in a sequence of `length` tokens.

    An adapter needs the input that its weight's gradient would need, and for B's gradient the product of A. What frozen
    experts need not keep is counted nevertheless.
    """
    size, tp = arch.sizes(), layout.tp
    split = tp if sequence_parallel else 1
    values = stack.kept_hidden * size["hidden"] / split
    values += (stack.kept_queries * size["queries"] + stack.kept_keys * size["keys"]) / tp
    values += arch.heads / tp * (4 / stack.weight_bytes if stack.tiled_attention else length)
    if arch.experts:  # a token goes to this many experts, wherever they are; routing is assumed to be even
        sent = arch.experts_per_token * (stack.kept_expert_ffn * size["expert_ffn"] + size["hidden"])
        values += (sent + 2 * arch.experts) / split
    else:
        values += stack.kept_ffn * size["ffn"] / tp
    values += adapter_rank * sum(len(slot.hf) for slot in adapted(arch))
    return values * stack.weight_bytes


def _values(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
