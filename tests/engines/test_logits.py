"""Logits of Megatron's shards over TP2 x PP2 equal those of `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_trd.data.batching import Sample, micro_batches
from megatron_trd.models.folder import ModelFolder
from tests.distributed import run_ranks
from tests.engines import reference
from tests.models import write_model

PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 17, 9)]
RESPONSES = [tuple(range(40, 40 + length)) for length in (7, 4, 12)]


def run_logits(rank: int, world: int, model: str, tp: int, pp: int) -> list[torch.Tensor] | None:
    """Rank function: `[response tokens, vocabulary]` of each sample on the last rank, None elsewhere."""
    from megatron_trd import platform
    from megatron_trd.engines.schedule import run_schedule
    from megatron_trd.models import loading
    from megatron_trd.models.architecture import build_model, read_architecture, transformer_config
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    grid = student_grid(tp, pp, seed=0)
    folder = ModelFolder(model)
    arch = read_architecture(folder)
    with platform.current().megatron():
        network = build_model(arch, grid, transformer_config(arch, grid), with_head=True)
    loading.load(loading.local_parameters(network, arch, grid), arch, grid, loading.folder_source(folder))
    samples = [
        Sample(prompt, prompt, response, (0.0,) * len(response))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    batches = micro_batches(samples, [0, 1, 2], "student", size=2, multiple=1, device=torch.device("cpu"))
    outputs = run_schedule(network, grid, batches)
    found: dict[int, torch.Tensor] = {}
    for batch, hidden in zip(batches, outputs, strict=bool(outputs)):
        head = network.shared_embedding_or_output_weight() if arch.tied else network.output_layer.weight
        part = (batch.select(hidden) @ head.t()).contiguous()
        parts = [torch.empty_like(part) for _ in range(tp)]
        dist.all_gather(parts, part, group=grid.groups.tp)
        whole = torch.cat(parts, dim=1)[:, : arch.vocab_size].detach()
        found.update(zip(batch.samples, whole.split(batch.lengths), strict=True))
    return [found[index] for index in range(3)] if rank == world - 1 else None


@pytest.mark.parametrize(
    ("family", "tied", "tp", "pp"),
    [("qwen3", False, 2, 2), ("qwen3", True, 2, 2), ("llama", False, 2, 2), ("llama", True, 1, 1)],
)
def test_logits_equal_transformers(tmp_path: Path, family: str, tied: bool, tp: int, pp: int) -> None:
    folder = write_model(tmp_path / "model", family=family, seed=4, tie_word_embeddings=tied)
    found = run_ranks(run_logits, tp * pp, str(folder), tp, pp)[-1]
    model = reference.load(folder)
    for logits, prompt, response in zip(found, PROMPTS, RESPONSES, strict=True):
        expected = reference.response_logits(model, prompt, response).detach()
        assert expected.std() > 0.3, "logits must be far from uniform for this to mean anything"
        assert (logits.double() - expected).abs().max() < 1e-4
