"""SmolLM2-135M's real weights: there and back over TP 3, to the last bit; the logits and tokens of `transformers`."""

from __future__ import annotations

import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import real_input
from tests.checkpoint_tools.folders import tensors
from tests.checkpoint_tools.test_vllm import greedy_by_transformers, greedy_by_vllm
from tests.distributed import run_ranks
from tests.marks import on_real_input
from tests.weights.bits import same_bits

pytestmark = list(on_real_input)


def load_and_save(rank: int, world: int, source: str, target: str) -> None:
    """Rank function: megatron-core loads a checkpoint at TP 3 and saves it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_trd import platform
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.models.megatron_folder import load_model
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    filesystem_async._results_queue = queue.Queue()  # as in training/checkpoint.py
    arch, grid = open_model(source).arch, student_grid(world, 1, seed=0)
    with platform.current().megatron():
        model: Any = build_model(arch, grid, transformer_config(arch, grid), with_head=True)
        load_model(Path(source), model)
        if rank == 0:
            Path(target).mkdir()
        dist.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, target, sharded_strategy=("torch_dist", 1))


def test_smollm2_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf, megatron, saved, back = (tmp_path / name for name in ("hf", "megatron", "saved", "back"))
    real_input.write_model(hf)
    for command in (
        ["hf_to_megatron", "--hf", hf, "--out", megatron],
        ["verify", "--hf", hf, "--megatron", megatron, "--logits"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"checkpoint_tools.{command[0]}", *map(str, command[1:])], text=True
        )
        assert done.returncode == 0
    run_ranks(load_and_save, 3, str(megatron), str(saved))
    # models on a CPU are float32: back to the bits that went in
    arguments = ["--megatron", saved, "--out", back, "--like", hf, "--dtype", "bf16", "--max-shard-size", "100MB"]
    subprocess.run([sys.executable, "-m", "checkpoint_tools.megatron_to_hf", *map(str, arguments)], check=True)
    expected, found = tensors(hf), tensors(back)
    assert expected.keys() == found.keys()
    assert len(expected) == 272
    assert all(same_bits(expected[name], found[name]) for name in expected)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(back)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "1, 2, 3, 4,", "Once upon a time")]
    [[tokens]] = run_ranks(greedy_by_vllm, 1, [str(back)], prompts)
    assert tokens == greedy_by_transformers(hf, prompts)
    assert "Paris" in tokenizer.decode(tokens[0])
