"""Hugging Face -> Megatron shards -> Hugging Face: bit for bit, and laid out as megatron-core reads it.

A round trip alone would not see a layout that is wrong in both directions, so shards are also compared with a layout
written out here row by row, after megatron-core's `SelfAttention.get_query_key_value_tensors` (each key/value group:
its queries, its key, its value, weights and biases alike), its gated `linear_fc1` (a rank's gate rows above its up
rows, for each expert) and padded embedding.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_trd.models.architecture import VOCAB_MULTIPLE, Architecture, read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.weights import FAMILIES, Slot, merge, shard, slots, stage_of
from tests import models
from tests.weights.bits import random_bits, same_bits

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = (torch.float32, torch.bfloat16)
Shard = Callable[[Slot, Sequence[Tensor], Architecture, int, int], Tensor]
MOE = "Qwen3MoeForCausalLM"


def architecture(family: str = "Qwen3ForCausalLM", **fields: Any) -> Architecture:
    """6 query heads over 2 groups, head size other than hidden / heads, a prime-like vocabulary, 3 experts if any."""
    values: dict[str, Any] = {
        "family": family,
        "layers": 2,
        "hidden_size": 10,
        "ffn_size": 14,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 3,
        "vocab_size": 1003,
        "max_positions": 64,
        "tied": False,
        "norm_eps": 1e-6,
        "rope_frequencies": (1.0,),
    }
    if family == MOE:
        values |= {"experts": 3, "experts_per_token": 2, "expert_ffn_size": 6}
    return Architecture(**values | fields)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, int]:
    """An architecture of awkward sizes and a tensor parallelism that fits it."""
    tp = draw(st.sampled_from([1, 2, 4]))
    kv_heads = tp * draw(st.integers(1, 3))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    experts = {"experts": draw(st.integers(1, 4)), "expert_ffn_size": tp * draw(st.integers(1, 3))}
    arch = architecture(
        family,
        layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 12)),
        ffn_size=tp * draw(st.integers(1, 5)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 5)),
        vocab_size=draw(st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 256, 257, 512, 1003]))),
        tied=draw(st.booleans()),
        **(experts if family == MOE else {}),
    )
    return arch, tp


def full_model(arch: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for slot in slots(arch) for name, shape in zip(slot.hf, slot.shapes, strict=True)}
    return {name: random_bits(shape, dtype, generator) for name, shape in shapes.items()}


def laid_out(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    """A rank's shard, one row (of `row` slots: one column) at a time."""
    if slot.kind == "replicated":
        return full[0]
    if slot.kind == "row":
        width = full[0].shape[1] // tp
        return torch.stack([full[0][:, rank * width + place] for place in range(width)], dim=1)
    if slot.kind == "gated":
        height = (arch.ffn_size if slot.expert is None else arch.expert_ffn_size) // tp
        return torch.stack([part[rank * height + place] for part in full for place in range(height)])
    if slot.kind == "vocab":
        height = -(-arch.vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE
        padding = torch.zeros(arch.hidden_size, dtype=full[0].dtype)
        tokens = range(rank * height, (rank + 1) * height)
        return torch.stack([full[0][token] if token < arch.vocab_size else padding for token in tokens])
    query, key, value = full
    of_group, size = arch.heads // arch.kv_heads, arch.head_dim
    rows = []
    for group in range(rank * arch.kv_heads // tp, (rank + 1) * arch.kv_heads // tp):
        rows += [query[(group * of_group + head) * size + place] for head in range(of_group) for place in range(size)]
        rows += [key[group * size + place] for place in range(size)]
        rows += [value[group * size + place] for place in range(size)]
    return torch.stack(rows)


def check_layout(arch: Architecture, tp: int, dtype: torch.dtype, cut: Shard) -> None:
    """Every shard that `cut` makes is the one megatron-core reads."""
    tensors = full_model(arch, dtype)
    for slot in slots(arch):
        full = [tensors[name] for name in slot.hf]
        for rank in range(tp):
            assert same_bits(cut(slot, full, arch, rank, tp), laid_out(slot, full, arch, rank, tp)), (slot, rank)


@QUICK
@given(cases(), st.sampled_from(DTYPES))
def test_there_and_back_is_bit_exact(case: tuple[Architecture, int], dtype: torch.dtype) -> None:
    arch, tp = case
    tensors = full_model(arch, dtype)
    back: dict[str, Tensor] = {}
    for slot in slots(arch):
        full = [tensors[name] for name in slot.hf]
        shards = [shard(slot, full, arch, rank, tp) for rank in range(tp)]
        assert len({(part.shape, part.dtype) for part in shards}) == 1, "ranks hold equal shares"
        merged = merge(slot, shards, arch)
        assert all(same_bits(old, new) for old, new in zip(full, merged, strict=True)), slot
        if slot.exported:
            back |= dict(zip(slot.hf, merged, strict=True))
    assert back.keys() == tensors.keys()
    assert all(same_bits(tensors[name], back[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2])
def test_there_and_back_at_the_awkward_sizes(tp: int, family: str, tied: bool, dtype: torch.dtype) -> None:
    arch = architecture(family, tied=tied)
    tensors = full_model(arch, dtype)
    for slot in slots(arch):
        full = [tensors[name] for name in slot.hf]
        merged = merge(slot, [shard(slot, full, arch, rank, tp) for rank in range(tp)], arch)
        assert all(same_bits(old, new) for old, new in zip(full, merged, strict=True)), slot


@QUICK
@given(cases(), st.sampled_from(DTYPES))
def test_shards_are_laid_out_as_megatron_reads_them(case: tuple[Architecture, int], dtype: torch.dtype) -> None:
    arch, tp = case
    check_layout(arch, tp, dtype, shard)


def _not_grouped(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    """All of a rank's queries, then its keys, then its values."""
    if slot.kind != "qkv":
        return shard(slot, full, arch, rank, tp)
    return torch.cat([part.chunk(tp)[rank] for part in full])


def _biases_not_grouped(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    return (_not_grouped if full[0].dim() == 1 else shard)(slot, full, arch, rank, tp)


def _dense_layers_alone_are_gated(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    """Gate and up of dense layers right, those of experts cut as if they were one tensor."""
    return (shard if slot.expert is None else _gate_and_up_cut_as_one)(slot, full, arch, rank, tp)


def _keys_for_values(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    return shard(slot, [full[0], full[2], full[1]] if slot.kind == "qkv" else full, arch, rank, tp)


def _up_above_gate(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    return shard(slot, full[::-1] if slot.kind == "gated" else full, arch, rank, tp)


def _gate_and_up_cut_as_one(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    return torch.cat(list(full)).chunk(tp)[rank] if slot.kind == "gated" else shard(slot, full, arch, rank, tp)


def _ranks_in_reverse(slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int) -> Tensor:
    return shard(slot, full, arch, tp - 1 - rank, tp)


def _vocabulary_cut_before_padding(
    slot: Slot, full: Sequence[Tensor], arch: Architecture, rank: int, tp: int
) -> Tensor:
    if slot.kind != "vocab":
        return shard(slot, full, arch, rank, tp)
    part = full[0].tensor_split(tp)[rank]
    return torch.nn.functional.pad(part, (0, 0, 0, arch.padded_vocab(tp) // tp - part.shape[0]))


@pytest.mark.parametrize(
    ("wrong", "family"),
    [
        *itertools.product(
            (
                _not_grouped,
                _keys_for_values,
                _up_above_gate,
                _gate_and_up_cut_as_one,
                _ranks_in_reverse,
                _vocabulary_cut_before_padding,
            ),
            FAMILIES,
        ),
        (_biases_not_grouped, "Qwen2ForCausalLM"),
        (_dense_layers_alone_are_gated, MOE),
    ],
)
def test_a_permuted_layout_is_caught(wrong: Shard, family: str) -> None:
    arch = architecture(family, heads=12, kv_heads=4)  # with one group a rank, grouped and not grouped are the same
    check_layout(arch, 2, torch.float32, shard)
    with pytest.raises(AssertionError):
        check_layout(arch, 2, torch.float32, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_merged_in_another_order_are_another_model(family: str) -> None:
    arch = architecture(family)
    tensors = full_model(arch, torch.float32)
    for slot in slots(arch):
        full = [tensors[name] for name in slot.hf]
        shards = [shard(slot, full, arch, rank, 2) for rank in (1, 0)]
        intact = all(same_bits(old, new) for old, new in zip(full, merge(slot, shards, arch), strict=True))
        assert intact == (slot.kind == "replicated"), slot


@QUICK
@given(st.integers(1, 2000), st.sampled_from([1, 2, 4, 8]))
def test_padded_vocabulary_is_the_least_multiple_that_every_rank_shares(vocab: int, tp: int) -> None:
    padded = architecture(vocab_size=vocab).padded_vocab(tp)
    assert padded % (VOCAB_MULTIPLE * tp) == 0
    assert vocab <= padded < vocab + VOCAB_MULTIPLE * tp


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 1003])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_is_zero_and_beyond_the_vocabulary(vocab: int, tp: int) -> None:
    arch = architecture(vocab_size=vocab)
    slot = slots(arch)[0]
    shards = [shard(slot, [torch.ones(vocab, arch.hidden_size)], arch, rank, tp) for rank in range(tp)]
    whole = torch.cat(shards)
    assert whole.shape[0] == arch.padded_vocab(tp)
    assert whole[:vocab].eq(1).all()
    assert whole[vocab:].eq(0).all()


# The table


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_table_has_every_tensor_that_transformers_stores(tmp_path: Path, family: str, tied: bool) -> None:
    # What is in the file, not in the model: `transformers` holds all experts as one tensor and stores each apart.
    sizes = {"hidden_size": 12, "num_attention_heads": 6, "head_dim": 4, "intermediate_size": 14, "vocab_size": 1003}
    path = models.write_model(tmp_path, family=family, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
    stored = load_file(path / "model.safetensors")
    exported = [slot for slot in slots(read_architecture(ModelFolder(path))) if slot.exported]
    found = [(name, shape) for slot in exported for name, shape in zip(slot.hf, slot.shapes, strict=True)]
    assert len(found) == len(dict(found)), "no tensor is exported twice"
    assert dict(found) == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@QUICK
@given(cases())
def test_every_place_of_a_stacked_tensor_is_filled_once(case: tuple[Architecture, int]) -> None:
    arch, _ = case
    places: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    stacks: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for slot in slots(arch):
        places[slot.key].append(slot.index)
        stacks[slot.key].add((slot.stack, slot.whole))
    for key, found in places.items():
        ((stack, _),) = stacks[key]  # one shape for all layers and experts
        assert sorted(found) == sorted(itertools.product(*map(range, stack))), key
        assert stack == (() if not key.startswith("decoder.layers.") else (arch.layers, arch.experts)[: len(stack)])
    assert len({name for slot in slots(arch) for name in slot.megatron}) == sum(
        len(slot.megatron) for slot in slots(arch)
    ), "no two parameters have one name"


@QUICK
@given(cases())
def test_the_whole_parameter_is_the_shard_of_one_rank_without_padding(case: tuple[Architecture, int]) -> None:
    arch, _ = case
    for slot in slots(arch):
        alone = shard(slot, [torch.empty(shape) for shape in slot.shapes], arch, 0, 1)
        rows = arch.padded_vocab(1) if slot.kind == "vocab" else slot.whole[0]
        assert tuple(alone.shape) == (rows, *slot.whole[1:]), slot


def test_an_expert_s_tensors_have_its_index_in_every_name() -> None:
    of_experts = [slot for slot in slots(architecture(MOE, experts=12)) if slot.expert is not None]
    assert len(of_experts) == 2 * 12 * 2, "layers, experts, and the two parameters of each"
    for slot in of_experts:
        assert all(f".experts.{slot.expert}." in name for name in slot.hf), slot
        local, engine = slot.megatron
        assert f".local_experts.{slot.expert}.linear_fc" in local
        assert engine.endswith(f".weight{slot.expert}")
    keys = {slot.key for slot in of_experts}
    assert keys == {f"decoder.layers.mlp.experts.experts.linear_fc{part}.weight" for part in (1, 2)}, "one for all"


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(sorted(FAMILIES)))
def test_every_layer_is_on_one_stage_and_stages_hold_equal_runs_of_them(pp: int, per_stage: int, family: str) -> None:
    arch = architecture(family, layers=pp * per_stage)
    for slot in slots(arch):
        expected = slot.layer // per_stage if slot.place == "layer" else {"first": 0, "last": pp - 1}[slot.place]
        assert stage_of(slot, arch, pp) == expected
    layers = [slot for slot in slots(arch) if slot.place == "layer"]
    assert {slot.layer for slot in layers} == set(range(arch.layers))
    assert all(f".{slot.layer}." in name for slot in layers for name in (*slot.hf, *slot.megatron))
