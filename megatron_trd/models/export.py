"""Writes a Hugging Face folder, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.files import HashedFile, write_sums
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.folder import INDEX, WEIGHT_DTYPES, ModelFolder, TensorInfo
from megatron_trd.models.weights import Slot, exported_slots

# Files that make the weights a usable model, as patterns.
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
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file: the default of the hub's own tools


def copy_companions(like: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    """Copy configuration and tokenizer of a folder; `dtype`: the weights' dtype to record in the configuration."""
    for file in (path for pattern in _COMPANIONS for path in like.path.glob(pattern) if path.is_file()):
        copy = target / file.relative_to(like.path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    said = config | ({key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name})
    if said != config:
        (target / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def exported_tensors(arch: Architecture, dtype: Callable[[Slot], torch.dtype]) -> list[TensorInfo]:
    """Every Hugging Face tensor of a model, in the order of `slots`."""
    return [
        TensorInfo(name, dtype(slot), shape)
        for slot in exported_slots(arch)
        for name, shape in zip(slot.hf, slot.shapes, strict=True)
    ]


def main_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype of most of a model's values, which its configuration names."""
    values: Counter[torch.dtype] = Counter()
    for info in tensors:
        values[info.dtype] += info.nbytes // info.dtype.itemsize
    return values.most_common(1)[0][0]


class FolderWriter:
    """Writes `tensors` into safetensors files of a folder, in the order given, each whole or in pieces of rows."""

    def __init__(self, target: Path, tensors: Sequence[TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._target = target
        self._shards = _cut(tensors, max_shard_bytes)
        self._next = [(shard, info) for shard, infos in enumerate(self._shards) for info in infos]
        self._missing = 0  # bytes still to come of the tensor being written
        self._file: HashedFile | None = None
        self.digests: dict[str, str] = {}  # file name -> BLAKE3 hash, of the finished files

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, or its next rows. Tensors must come in the announced order."""
        shard, info = self._next[0]
        if not self._missing:
            self._missing = info.nbytes
        tensor = tensor.detach().to("cpu").contiguous()
        assert (name, tensor.dtype) == (info.name, info.dtype), f"{name} {tensor.dtype} came for {info}"
        assert tensor.shape[1:] == info.shape[1:], f"{name} {list(tensor.shape)} came for {info}"
        if self._file is None:
            self._file = HashedFile(self._target / self._name(shard))
            self._file.write(_header(self._shards[shard]))
        data = tensor.reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._missing -= len(data)
        assert self._missing >= 0, f"more came than {info}"
        if not self._missing:
            self._next.pop(0)
            if not self._next or self._next[0][0] != shard:
                self.digests[self._name(shard)] = self._file.close()
                self._file = None

    def _name(self, shard: int) -> str:
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def close(self, like: ModelFolder, dtype: torch.dtype) -> None:
        """Write index, configuration, tokenizer and checksums: until then nothing loads the files."""
        assert not self._next, f"{len(self._next)} tensors did not come, the first {self._next[0][1]}"
        infos = [info for shard in self._shards for info in shard]
        weight_map = {info.name: self._name(index) for index, shard in enumerate(self._shards) for info in shard}
        index = {"metadata": {"total_size": sum(info.nbytes for info in infos)}, "weight_map": weight_map}
        (self._target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(like, self._target, dtype)
        write_sums(self._target, self.digests)


def write_folder(
    target: Path, like: ModelFolder, arch: Architecture, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write a whole model, given as (name, tensor) in the order of `slots`, with what `like` has beside its weights.

    Collective when `tensors` is: every rank consumes them, rank 0 writes.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        for _ in tensors:
            pass
        return
    target.mkdir(parents=True)
    writer = FolderWriter(target, exported_tensors(arch, lambda _: dtype))
    for name, tensor in tensors:
        writer.write(name, tensor)
    writer.close(like, dtype)


def _cut(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Tensors by file: as many as fit, each at an offset that is a multiple of its dtype's size, as readers require."""
    shards: list[list[TensorInfo]] = []
    size = max_bytes
    for info in tensors:
        if not shards or size + info.nbytes > max_bytes or size % info.dtype.itemsize:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    """A safetensors header: its length, then where each tensor is, padded so that data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        place = [offset, offset + info.nbytes]
        entries[info.name] = {"dtype": WEIGHT_DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": place}
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
