"""Full tensors gathered over a grid are those of the folder it was loaded from, bit for bit, in either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_trd.models import loading
from megatron_trd.models.gathering import buckets
from megatron_trd.models.weights import Slot, exported_slots
from tests.distributed import run_ranks
from tests.models import write_model
from tests.weights.test_mapping import MOE, architecture

SMALL = 40_000  # bytes a bucket: the embedding has more, and a layer takes several


def elements(slot: Slot) -> int:
    return sum(torch.Size(shape).numel() for shape in slot.shapes)


def in_pieces(slot: Slot, source: loading.Source) -> bool:
    """Whether the pieces of a slot put together are its tensors, and each value is in one piece."""
    full = source(slot)
    found = [torch.full_like(tensor, torch.nan) for tensor in full]
    copied = sum(piece.copy_to(found[piece.index]) for piece in loading.piecewise(source)(slot))
    return copied == elements(slot) and all(map(torch.equal, found, full))


@pytest.mark.parametrize("limit", [1, 150, 1000, 10**9])
@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", MOE])
def test_buckets_keep_order_and_limit(family: str, limit: int) -> None:
    table = list(exported_slots(architecture(family)))
    filled = buckets(table, limit)
    assert [slot for bucket in filled for slot in bucket.slots] == table
    for bucket in filled:
        assert bucket.size == sum(map(elements, bucket.slots))
        alone = len(bucket.slots) == 1 or all(slot.expert is not None for slot in bucket.slots)
        assert bucket.size <= limit or alone
    home = {slot: number for number, bucket in enumerate(filled) for slot in bucket.slots}
    for layer in range(2):
        experts = {home[slot] for slot in table if slot.expert is not None and slot.layer == layer}
        assert len(experts) == (family == MOE), "the experts of a layer are in one bucket"
    if limit == 10**9:
        assert len(filled) == 1


CASES = [  # family, TP, PP, EP, tied
    ("qwen3", 2, 2, 1, False),
    ("qwen3", 4, 1, 1, True),
    ("qwen2", 1, 2, 1, True),
    ("llama", 2, 1, 1, False),
    ("qwen3_moe", 1, 1, 4, False),
    ("qwen3_moe", 2, 1, 4, True),
    ("qwen3_moe", 1, 2, 2, False),
    ("qwen3_moe", 4, 1, 2, False),
]


def gather_ranks(rank: int, world: int, folders: dict[tuple[str, bool], list[str]]) -> list[dict[str, Any]]:
    """Rank function: for each case and way, whether what is gathered is what was loaded."""
    from megatron_trd import platform

    platform.current().set_up()
    torch.set_num_threads(1)
    return [
        check_case(folders[family, tied], tp, pp, ep, together)
        for family, tp, pp, ep, tied in CASES
        for together in (True, False)
    ]


def check_case(folders: list[str], tp: int, pp: int, ep: int, together: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.models.gathering import SpreadWeights
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    current = platform.current()
    opened = [open_model(folder) for folder in folders]
    arch = opened[0].arch
    grid = student_grid(tp, pp, ep, seed=0)
    with current.megatron():
        config = transformer_config(arch, grid, sequence_parallel=bool(arch.experts) and tp > 1)
        network = build_model(arch, grid, config, with_head=True)

    named = loading.local_parameters(network, arch, grid)
    with mock.patch.object(current, "peers", current.peers if together else lambda *_: None):
        spread = SpreadWeights(named, arch, grid, SMALL)

    def is_loaded(folder: str) -> bool:
        expected = load_file(Path(folder, "model.safetensors"))
        found = {name: full.clone() for name, full in loading.named_tensors(arch, spread.source())}
        return found.keys() == expected.keys() and all(found[name].equal(full) for name, full in expected.items())

    seen = {}
    for number, model in enumerate(opened):
        spread.settle()
        loading.load(named, arch, grid, model.source)
        seen[f"model {number}"] = is_loaded(folders[number])
    left, right = spread.source(), spread.source()
    seen["in pieces"] = all(in_pieces(slot, left) for slot in exported_slots(arch))
    seen["two sources in turn"] = all(
        a.equal(b)
        for slot in (*exported_slots(arch)[::5], *exported_slots(arch))  # some buckets left out, then none
        for first, second in ((left, right), (right, left))
        for a, b in zip([full.clone() for full in first(slot)], second(slot), strict=True)
    )
    seen["together"] = together == (spread.peers is not None)
    parallel_state.destroy_model_parallel()
    return seen


def test_gathered_tensors(tmp_path: Path) -> None:
    folders = {}
    for family, _, _, _, tied in CASES:
        fields = {"num_key_value_heads": 4, "tie_word_embeddings": tied}
        names = [str(tmp_path / f"{family}-{tied}-{seed}") for seed in (0, 1)]
        folders[family, tied] = [
            str(write_model(Path(name), family=family, seed=seed, **fields)) for seed, name in enumerate(names)
        ]
    for found in run_ranks(gather_ranks, 4, folders):
        for number, seen in enumerate(found):
            assert all(seen.values()), (CASES[number // 2], "one machine" if number % 2 == 0 else "collective", seen)
