"""What was exported is a model for vLLM as it stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd import platform
from megatron_trd.config import SamplerConfig
from tests.distributed import run_ranks
from tests.models import write_model

Prompts = Sequence[Sequence[int]]
PROMPTS: Prompts = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [12]]
TOKENS = 10
MODELS: dict[str, dict[str, Any]] = {
    "qwen3 tied": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen3 yarn": {
        "family": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
        },
    },
    "qwen3 moe": {"family": "qwen3_moe"},
    "qwen2": {"family": "qwen2", "hidden_size": 128},  # vLLM's head size there is hidden size / heads
    "llama": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
}


_ENGINES: list[Any] = []


def greedy_by_vllm(rank: int, world: int, folders: list[str], prompts: Prompts) -> list[list[list[int]]]:
    """Rank function: greedy continuations of `prompts` by each folder's model."""
    current = platform.current()
    os.environ.update(current.sampler_environment())
    arguments = current.sampler_arguments(SamplerConfig(), 64, sleeps=False, alone=False)
    from vllm import LLM, SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    found = []
    # To the end of the process: the first to be dropped would take everyone's process groups with it.
    with current.starting_sampler("exported"):
        _ENGINES.extend(LLM(model=folder, dtype="float32", max_model_len=64, **arguments) for folder in folders)
    for llm in _ENGINES:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    return found


def greedy_by_transformers(folder: Path, prompts: Prompts) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(TOKENS):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model's folder after there and back, in several files."""
    folders = {}
    for name, fields in MODELS.items():
        root = tmp_path_factory.mktemp("vllm")
        write_model(root / "hf", num_hidden_layers=2, **fields)
        hf_to_megatron.convert(root / "hf", root / "megatron")
        megatron_to_hf.convert(root / "megatron", root / "export", max_shard_bytes=100_000)
        assert len(list((root / "export").glob("*.safetensors"))) > 1
        folders[name] = root / "export"
    return folders


@pytest.mark.parametrize("experts", [False, True])  # a process of vLLM is for one or the other
def test_vllm_gives_the_greedy_tokens_of_transformers(exported: dict[str, Path], experts: bool) -> None:
    models = {name: folder for name, folder in exported.items() if ("moe" in name) == experts}
    [found] = run_ranks(greedy_by_vllm, 1, [str(folder) for folder in models.values()], PROMPTS)
    for (name, folder), tokens in zip(models.items(), found, strict=True):
        assert tokens == greedy_by_transformers(folder.parent / "hf", PROMPTS), name
        assert len({token for row in tokens for token in row}) > 3, "a model that says more than one thing"
