"""Writes a Hugging Face folder from full tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_trd.models.folder import ModelFolder

# Files of the source folder that make the weights a usable model.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file, and of what is held in memory


def write_folder(target: Path, like: ModelFolder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors`, in the dtype they have, with the configuration and tokenizer of `like`.

    Collective when `tensors` is: every rank consumes them, rank 0 writes.
    """
    writer = not dist.is_initialized() or dist.get_rank() == 0
    if writer:
        target.mkdir(parents=True, exist_ok=True)
    shards: list[str] = []
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(shards) + 1:05d}.safetensors"
        save_file(held, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        shards.append(file)
        held.clear()

    size = 0
    for name, tensor in tensors:
        if not writer:
            continue
        stored = tensor.detach().cpu().contiguous()
        if held and size + stored.nbytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        held[name] = stored
        size += stored.nbytes
        total += stored.nbytes
    if not writer:
        return
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file in _COMPANIONS:
        if (like.path / file).is_file():
            shutil.copyfile(like.path / file, target / file)
