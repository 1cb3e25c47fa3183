"""megatron-core distributed checkpoints (`torch_dist`), written and read one tensor at a time by a single process.

megatron-core itself saves and loads whole models. Here a checkpoint is written piece by piece in the format of
megatron-core's own save (the sharded tensors of a model at TP1 PP1 EP1, layers and experts stacked on leading axes), so
any TP x PP x EP layout can load it; a checkpoint saved at any layout is read piece by piece. On disk: `.metadata`
(pickled torch.distributed.checkpoint `Metadata`: where each piece of each tensor is), `__K_0.distcp` (the pieces, each
as `torch.save` writes it), `common.pt` (what is not sharded) and `metadata.json`.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_trd.errors import UserError, line_of
from megatron_trd.files import HashedFile
from megatron_trd.models.architecture import Architecture

# Bytes of a tensor written or read at once, unless one row is larger. For larger pieces the C library gets new memory
# from the system each time, which costs more than copying them.
PIECE_BYTES = 2**24
_FILE_BYTES = 2**32  # of one file, after which the next is started
# What megatron-core writes beside the tensors and checks when loading.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a megatron-core distributed checkpoint."""
    return (path / "metadata.json").is_file() and (path / ".metadata").is_file()


class CheckpointWriter:
    """Writes a checkpoint into a folder, tensors in any order, each in pieces of rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: HashedFile | None = None
        self._name = ""
        self.digests: dict[str, str] = {}  # file name -> BLAKE3 hash, of the finished files

    def add(self, key: str, size: Sequence[int], index: tuple[int, ...], tensor: Tensor, row: int = 0) -> None:
        """Write `tensor`: `[*index, row:row + len(tensor)]` of the stacked tensor `key` of shape `size`.

        It must own its memory: `torch.save` writes the whole storage of a view.
        """
        properties = TensorProperties(dtype=tensor.dtype)
        known = self._tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(size), []))
        assert isinstance(known, TensorStorageMetadata)
        assert known.size == torch.Size(size), f"{key} has two shapes"
        offsets = torch.Size((*index, row, *(0,) * (tensor.dim() - 1)))
        tensor = tensor.reshape(*(1,) * len(index), *tensor.shape)
        known.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        self._save(MetadataIndex(key, offsets), tensor)

    def add_object(self, key: str, value: Any) -> None:
        """Write one of megatron-core's sharded objects."""
        self._tensors[key] = BytesStorageMetadata()
        self._save(MetadataIndex(key), [value])

    def _save(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None:
            self._name = f"__{len(self.digests)}_0.distcp"
            self._file = HashedFile(self._path / self._name)
        begin = self._file.tell()
        torch.serialization.set_crc32_options(False)  # the file's own checksum is stronger, in another thread
        try:
            torch.save(value, self._file)  # type: ignore[arg-type]  # it only needs write and flush
        except RuntimeError:  # what torch raises when a write fails
            raise self._file.error or RuntimeError(f"{index} cannot be saved") from None
        finally:
            torch.serialization.set_crc32_options(True)
        self._places[index] = _StorageInfo(self._name, begin, self._file.tell() - begin)
        if self._file.tell() >= _FILE_BYTES:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self.digests[self._name] = self._file.close()
            self._file = None

    def close(self) -> None:
        """Write the metadata that makes the files a checkpoint: until then nothing loads them."""
        self._end_file()
        torch.save({}, self._path / "common.pt")
        metadata = Metadata(self._tensors, storage_data=self._places, version="1.0.0")
        (self._path / ".metadata").write_bytes(pickle.dumps(metadata))
        (self._path / "metadata.json").write_text(json.dumps(_FORMAT))


def write_states(writer: CheckpointWriter, arch: Architecture) -> None:
    """Write the empty states of a model's layers (FP8 scales, which do not exist yet).

    megatron-core expects them when loading: those of the local layers, and those of transformer-engine's, whose norms
    have one if they are not part of a linear layer.
    """
    modules = ["self_attention.linear_proj", "self_attention.linear_qkv", "self_attention.core_attention"]
    modules += ["pre_mlp_layernorm"] if arch.experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    norms = "self_attention.q_layernorm", "self_attention.k_layernorm"
    modules += [norm for norm in norms if arch.has(f"{norm}.weight")]
    writer.add_object("decoder.final_layernorm._extra_state/shard_0_1", None)
    for layer in range(arch.layers):
        for module in modules:
            writer.add_object(f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.layers}", None)
        for linear, expert in itertools.product(("linear_fc1", "linear_fc2"), range(arch.experts)):
            place = f"{layer}.{expert}_{arch.layers}.{arch.experts}"
            writer.add_object(f"decoder.layers.mlp.experts.experts.{linear}._extra_state/shard_{place}", None)


class CheckpointReader:
    """Reads tensors of a checkpoint of any layout. Raises `UserError` for one that is broken or not a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_checkpoint(path):
            raise UserError(f"'{path}' is not a Megatron distributed checkpoint: no .metadata and metadata.json in it")
        try:
            kind = json.loads((path / "metadata.json").read_text())["sharded_backend"]
            if kind != "torch_dist":
                raise ValueError(f"its format is {kind}, supported is torch_dist")
            self._metadata: Metadata = _MetadataUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
            self._places: dict[MetadataIndex, _StorageInfo] = self._metadata.storage_data
            self._check_structure()
            names = {place.relative_path for place in self._places.values()}
        except Exception as error:  # a pickle that was tampered with can raise anything
            raise UserError(f"checkpoint '{path}' cannot be read: {line_of(error, 200)}") from None
        for name in sorted(names):
            if Path(name).name != name:
                raise UserError(f"checkpoint '{path}': .metadata names the file {name!r}, outside the folder")
            if not (path / name).is_file():
                raise UserError(f"checkpoint '{path}' lacks its file {name}: copy the folder again")

    def _check_structure(self) -> None:
        """Raise if the metadata is not of the types it should be."""
        for place in self._places.values():
            if not (isinstance(place.relative_path, str) and isinstance(place.offset + place.length, int)):
                raise ValueError(f"it has {place} in place of a part of a file")
        for key, value in self._metadata.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                continue
            if not (isinstance(value, TensorStorageMetadata) and isinstance(value.properties.dtype, torch.dtype)):
                raise ValueError(f"{key} is neither a tensor nor an object")
            for sizes in (value.size, *(size for chunk in value.chunks for size in (chunk.offsets, chunk.sizes))):
                if len(sizes) != len(value.size) or not all(isinstance(size, int) for size in sizes):
                    raise ValueError(f"{key} has pieces of other dimensions than its own")

    def check_objects(self) -> None:
        """Raise `UserError` if one of megatron-core's sharded objects holds more than plain values.

        To be called before megatron-core loads a checkpoint, since it unpickles them unconditionally.
        """
        for key, value in self._metadata.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                self._load(key, MetadataIndex(key))

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return {key for key in self._metadata.state_dict_metadata if self.size(key) is not None}

    def size(self, key: str) -> tuple[int, ...] | None:
        """Shape of a stacked tensor; None if the checkpoint has no such tensor."""
        value = self._metadata.state_dict_metadata.get(key)
        return tuple(value.size) if isinstance(value, TensorStorageMetadata) else None

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensor(key).properties.dtype

    def _tensor(self, key: str) -> TensorStorageMetadata:
        value = self._metadata.state_dict_metadata[key]
        assert isinstance(value, TensorStorageMetadata)
        return value

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """`key[index]`: one layer (or expert) of a stacked tensor, whole."""
        tensor = self._tensor(key)
        size = torch.Size((*(1,) * len(index), *tensor.size[len(index) :]))
        offsets = torch.Size((*index, *(0,) * (len(size) - len(index))))
        target: Tensor | None = None
        filled = 0
        here = TensorStorageMetadata(tensor.properties, tensor.size, self._chunks(key, len(index)).get(index, []))
        for item in create_read_items_for_chunk_list(key, here, [ChunkStorageMetadata(offsets, size)]):
            source = _part(self._load(key, item.storage_index), item.storage_offsets, item.lengths)
            filled += source.numel()
            if source.shape == size:
                target = source
                break
            target = torch.empty(size, dtype=source.dtype) if target is None else target
            _part(target, item.dest_offsets, item.lengths).copy_(source)
        if target is None or filled != size.numel():
            raise UserError(f"checkpoint '{self.path}': {key} {list(index)} is not whole; copy the folder again")
        return target.view(size[len(index) :])

    def pieces(self, key: str, index: tuple[int, ...]) -> Iterator[Tensor]:
        """`key[index]` in consecutive pieces of rows: as saved if it was cut by rows only, else whole."""
        depth = len(index)
        size = self._tensor(key).size
        chunks = sorted(self._chunks(key, depth).get(index, []), key=lambda chunk: chunk.offsets[depth])
        row = 0
        for chunk in chunks:
            if chunk.offsets[depth] != row or chunk.sizes[depth + 1 :] != size[depth + 1 :]:
                break
            row += chunk.sizes[depth]
        if row != size[depth]:
            yield self.read(key, index)
            return
        for chunk in chunks:
            yield self._load(key, MetadataIndex(key, chunk.offsets)).view(chunk.sizes[depth:])

    @functools.cache  # noqa: B019  small, and a reader lives as long as its job
    def _chunks(self, key: str, depth: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Place on the first `depth` axes -> pieces saved there."""
        found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in self._tensor(key).chunks:
            found.setdefault(tuple(chunk.offsets[:depth]), []).append(chunk)
        return found

    def _load(self, key: str, index: MetadataIndex) -> Any:
        place = self._places.get(index)
        if place is None:
            raise UserError(f"checkpoint '{self.path}': .metadata does not say where {index} is; copy the folder again")
        try:
            with (self.path / place.relative_path).open("rb") as file:
                view = _create_file_view(file, place.offset, place.length)
                return torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except FileNotFoundError:  # it was there when the checkpoint was opened
            raise UserError(
                f"checkpoint '{self.path}' was removed while it was read: a run that goes on keeps its newest "
                "checkpoint.keep and the multiples of checkpoint.keep_every"
            ) from None
        except Exception as error:  # torch.load raises many kinds for damaged bytes
            raise UserError(
                f"'{self.path / place.relative_path}' is damaged: {key} cannot be read: {line_of(error, 120)}"
            ) from None


def _part(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for axis, (begin, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, begin, length)
    return tensor


# Classes that a checkpoint's `.metadata` consists of; anything else in its pickle is refused.
_SAFE = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # the plans that megatron-core keeps with the metadata to save faster the next time
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _SAFE.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs")
