"""Compares the logits of `transformers` and of megatron-core on the same text."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.models.architecture import build_model, transformer_config
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.lora import add_adapters
from megatron_trd.models.megatron_folder import MegatronFolder, load_model
from megatron_trd.parallel.grid import student_grid

_TEXT = (
    "Let f(x) = x^2 - 4x + 7. Completing the square gives (x - 2)^2 + 3, so the least value of f is 3, at x = 2.\n"
    "def mean(values):\n    return sum(values) / len(values)\nLe chat dort; 猫が寝ている."
)
_TOKENS = 64  # ids for a model without a tokenizer
# Largest difference of two logits attributed to rounding, by the dtype that the models compute in.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def compare_logits(folder: ModelFolder, checkpoint: MegatronFolder) -> tuple[bool, str]:
    """Whether the logits of both are equal up to rounding, and one line that says how far they differ."""
    ids = _ids(folder, checkpoint.arch.vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of megatron-core's, which the reader can do nothing about
        expected = _transformers_logits(folder, ids)
        found = _megatron_logits(checkpoint, ids)
    dtype = platform.current().dtype
    largest = (found - expected).abs().max().item()
    chosen = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    line = (
        f"logits of {ids.numel()} tokens differ by at most {largest:.1e} "
        f"({str(dtype).removeprefix('torch.')}, {_TOLERANCE[dtype]:.0e} allowed), same best token {chosen:.1%}"
    )
    return largest <= _TOLERANCE[dtype], line


def _ids(folder: ModelFolder, vocabulary: int) -> Tensor:
    if not folder.has_tokenizer:
        return torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    return torch.tensor([folder.tokenizer.encode(_TEXT, add_special_tokens=False)])


@torch.no_grad()
def _transformers_logits(folder: ModelFolder, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    current = platform.current()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=current.dtype, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    logits: Tensor = model.to(current.device)(ids.to(current.device)).logits
    return logits.float().cpu()


@torch.no_grad()
def _megatron_logits(checkpoint: MegatronFolder, ids: Tensor) -> Tensor:
    current, arch = platform.current(), checkpoint.arch
    current.set_up()
    dist.init_process_group(current.backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        grid = student_grid(1, 1, seed=0)
        ids = ids.to(current.device)
        with current.megatron():
            model: Any = build_model(arch, grid, transformer_config(arch, grid), with_head=True)
            if checkpoint.adapters:
                add_adapters(model, arch, grid, checkpoint.adapters.lora, split=False)
            load_model(checkpoint.path, model)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            hidden: Tensor = model(ids, positions, None)
            head = model.shared_embedding_or_output_weight() if arch.tied else model.output_layer.weight
            logits: Tensor = (hidden.transpose(0, 1) @ head.t())[..., : arch.vocab_size]
        return logits.float().cpu()
    finally:
        dist.destroy_process_group()
