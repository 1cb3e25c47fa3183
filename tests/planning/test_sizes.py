"""Parameters, activations and keys and values against the real models and engines that they are forecast for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_trd.models.architecture import Architecture
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning import sizes
from megatron_trd.planning.devices import LOCAL_LAYERS, TRANSFORMER_ENGINE
from megatron_trd.planning.shapes import PUBLISHED
from tests.distributed import run_ranks

DENSE = Architecture(
    family="Qwen3ForCausalLM",
    layers=4,
    hidden_size=128,
    ffn_size=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab_size=99,
    max_positions=512,
    tied=False,
    norm_eps=1e-6,
    rope_frequencies=(1.0,) * 16,
)
EXPERTS = replace(
    DENSE, family="Qwen3MoeForCausalLM", experts=8, experts_per_token=2, expert_ffn_size=64, normalised_routing=True
)


@pytest.mark.parametrize(
    ("name", "billions"),  # of the model cards, rounded as there
    [("0.6B", 0.6), ("1.7B", 1.7), ("4B", 4.0), ("8B", 8.2), ("14B", 14.8), ("32B", 32.8), ("30B-A3B", 30.5)],
)
def test_published_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert round(sizes.whole(PUBLISHED[f"Qwen3-{name}"]).total / 1e9, 1) == billions


def test_active_parameters_of_a_mixture_are_those_its_name_says() -> None:
    arch = PUBLISHED["Qwen3-30B-A3B"]
    active = sizes.products_per_token(arch).total + 2 * sizes.head_shard(arch, 1)
    assert round(active / 1e9, 1) == 3.4  # A3B; its card says 3.3


def count_parameters(rank: int, world: int, cases: list[tuple[Architecture, int, int, int, bool]]) -> list[Any]:
    """Rank function: (stage, number of parameters) of the real model of each case."""
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.parallel.grid import student_grid, teacher_grid

    platform.current().set_up()
    found = []
    for arch, tp, pp, ep, with_head in cases:
        grid = student_grid(tp, pp, ep, seed=0)
        if not with_head:
            grid = teacher_grid(tp, pp, ep)
        with platform.current().megatron():
            config = transformer_config(arch, grid, sequence_parallel=tp > 1 and bool(arch.experts))
            model = build_model(arch, grid, config, with_head=with_head)
        found.append((grid.pp_rank, sum(parameter.numel() for parameter in model.parameters())))
        parallel_state.destroy_model_parallel()
    return found


def test_parameters_of_every_rank_are_those_of_the_real_model() -> None:
    tied = replace(DENSE, tied=True)
    cases = [
        (DENSE, 1, 1, 1, True),
        (DENSE, 2, 1, 1, True),
        (DENSE, 2, 2, 1, True),
        (DENSE, 1, 4, 1, True),
        (DENSE, 2, 2, 1, False),
        (tied, 2, 1, 1, True),
        (tied, 2, 2, 1, True),
        (tied, 1, 2, 1, False),
        (EXPERTS, 1, 1, 4, True),
        (EXPERTS, 2, 1, 2, True),
        (EXPERTS, 2, 2, 1, True),
        (EXPERTS, 1, 2, 2, False),
    ]
    world = 4
    ranks = run_ranks(count_parameters, world, cases)
    for (arch, tp, pp, ep, with_head), found in zip(cases, zip(*ranks, strict=True), strict=True):
        layout = Layout(tp, pp, world, ep)
        for stage, count in found:
            expected = sizes.of_rank(arch, layout, stage, with_head=with_head).total
            assert expected == count, (tp, pp, ep, with_head, stage)


def test_adapters_of_a_layer() -> None:
    """Rank 64 at TP 1 and 4: q, k, v and o, then gate, up and down, each the rows of B and the columns of A."""
    arch, mixture = PUBLISHED["Qwen3-8B"], PUBLISHED["Qwen3-30B-A3B"]
    attention = (4096 + 4096) + 2 * (1024 + 4096) + (4096 + 4096)
    assert sizes.adapters_of_layer(arch, 64, 1) == 64 * (attention + 3 * (12288 + 4096))
    attention = (1024 + 4096) + 2 * (256 + 4096) + (4096 + 1024)
    assert sizes.adapters_of_layer(arch, 64, 4) == 64 * (attention + 2 * (3072 + 4096) + (4096 + 3072)) == 2_588_672
    experts_have_none = (2048 + 2048) + 2 * (256 + 2048) + (2048 + 2048)
    assert sizes.adapters_of_layer(mixture, 16, 2) == 16 * experts_have_none
    biases_have_none = replace(arch, family="Qwen2ForCausalLM")
    assert sizes.adapters_of_layer(biases_have_none, 64, 1) == sizes.adapters_of_layer(arch, 64, 1)
    assert sizes.adapters_of_layer(arch, 0, 1) == 0


def test_an_adapter_keeps_the_product_of_a() -> None:
    for name, adapters in (("Qwen3-8B", 7), ("Qwen3-30B-A3B", 4)):
        kept, plain = (
            sizes.kept_by_layer(
                PUBLISHED[name], Layout(4, 1, 4), 1000, TRANSFORMER_ENGINE, sequence_parallel=True, adapter_rank=rank
            )
            for rank in (64, 0)
        )
        assert kept - plain == adapters * 64 * 2


def saved_bytes(rank: int, world: int, cases: list[tuple[Architecture, int, bool, bool, int]]) -> list[float]:
    """Rank function: bytes that one layer keeps of a token for backward, from models of one and of two layers."""
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()

    def kept(arch: Architecture, grid: Any, sequence_parallel: bool, recompute: bool, length: int) -> int:
        torch.manual_seed(0)
        with platform.current().megatron():
            config = transformer_config(arch, grid, sequence_parallel=sequence_parallel, recompute=recompute)
            model = build_model(arch, grid, config, with_head=True)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        tokens = torch.randint(0, 90, (2, length))
        positions = torch.arange(length).expand(2, -1).contiguous()
        with platform.current().megatron(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, positions, None)
        return sum(storage.nbytes() for storage in storages.values())

    found = []
    for arch, tp, sequence_parallel, recompute, length in cases:
        grid = student_grid(tp, 1, seed=0)
        one, two = (kept(replace(arch, layers=layers), grid, sequence_parallel, recompute, length) for layers in (1, 2))
        found.append((two - one) / (2 * length))
        parallel_state.destroy_model_parallel()
    return found


def test_activations_of_a_layer_are_what_autograd_keeps() -> None:
    wide = replace(DENSE, hidden_size=256, ffn_size=640)
    cases = [
        (DENSE, 1, False, False, 64),
        (DENSE, 1, False, False, 192),
        (wide, 2, False, False, 64),
        (wide, 2, True, False, 64),
        (EXPERTS, 1, False, False, 64),
    ]
    [found, _] = run_ranks(saved_bytes, 2, cases)
    for (arch, tp, sequence_parallel, _, length), measured in zip(cases, found, strict=True):
        layout = Layout(tp, 1, 2)
        expected = sizes.kept_by_layer(arch, layout, length, LOCAL_LAYERS, sequence_parallel=sequence_parallel)
        assert expected == pytest.approx(measured, rel=0.03), (arch.hidden_size, tp, sequence_parallel, length)


def test_recomputation_keeps_a_layer_s_input() -> None:
    [found, _] = run_ranks(saved_bytes, 2, [(DENSE, 1, False, True, 64), (DENSE, 2, True, True, 64)])
    assert found == pytest.approx([4 * DENSE.hidden_size, 4 * DENSE.hidden_size / 2], rel=0.03)


@pytest.mark.parametrize("tp", [1, 2])
def test_keys_and_values_are_vllm_s_blocks(tp: int) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    arch = PUBLISHED["Qwen3-8B"]
    spec = FullAttentionSpec(
        block_size=sizes.KV_BLOCK,
        num_kv_heads=arch.kv_heads // tp,
        head_size=arch.head_dim,
        dtype=torch.bfloat16,
    )
    tokens = 1000  # 63 blocks, the last one not full
    assert sizes.kv_bytes(arch, tokens, tp, TRANSFORMER_ENGINE) == 63 * arch.layers * spec.page_size_bytes


def test_flops_of_a_forward_pass() -> None:
    arch, length = PUBLISHED["Qwen3-8B"], 4096
    weights = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    scores = 36 * 4 * 4096 * length**2
    assert sizes.forward_flops(arch, length, LOCAL_LAYERS) == 2 * weights * length + scores
    assert sizes.forward_flops(arch, length, TRANSFORMER_ENGINE, tp=2) == (2 * weights * length + scores / 2) / 2


def test_flops_of_adapters_are_those_of_their_shards() -> None:
    assert sizes.adapter_flops(PUBLISHED["Qwen3-8B"], 1000, 64, 4) == 36 * 2 * 2_588_672 * 1000


def test_experts_without_sequence_parallelism_are_not_cut() -> None:
    arch = PUBLISHED["Qwen3-30B-A3B"]
    cut = sizes.forward_flops(arch, 1000, TRANSFORMER_ENGINE, tp=4)
    whole = sizes.forward_flops(arch, 1000, TRANSFORMER_ENGINE, tp=4, sequence_parallel=False)
    assert whole - cut == 2 * 1000 * sizes.products_per_token(arch).experts * 3 / 4
