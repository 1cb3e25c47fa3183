"""A Hugging Face model folder on disk: configuration, tokenizer, and tensors read one at a time."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_trd.errors import UserError, line_of
from megatron_trd.files import check_small_sums

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
WEIGHT_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # and their safetensors names


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors file states about a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ModelFolder:
    """Reads `config.json`, the tokenizer and the safetensors of a local folder, each on demand.

    Raises `UserError` for a folder, configuration, index or shard that is missing or broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"model folder '{path}': no such folder; give a local Hugging Face folder")
        if not (self.path / "config.json").is_file():
            if (self.path / ADAPTER_CONFIG).is_file():
                raise UserError(f"model folder '{path}': adapters alone; give a model that they are merged into")
            raise UserError(f"model folder '{path}': no config.json; this is not a Hugging Face model folder")
        check_small_sums(self.path)

    @functools.cached_property
    def config(self) -> Any:
        """The folder's `transformers` configuration."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for fields it cannot use
            raise UserError(f"model folder '{self.path}': config.json cannot be read: {line_of(error)}") from None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer; a folder of weights alone has none."""
        return any((self.path / file).is_file() for file in _TOKENIZER_FILES)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:  # transformers would make an empty one
            raise UserError(f"model folder '{self.path}': no tokenizer; expected {' or '.join(_TOKENIZER_FILES)}")
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # as above
            raise UserError(f"model folder '{self.path}': no usable tokenizer: {line_of(error)}") from None

    @functools.cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a response, as in vLLM: those of generation_config.json, or of config.json where there is
        none, and the tokenizer's."""
        from transformers import GenerationConfig

        try:
            if (self.path / "generation_config.json").is_file():
                settings = GenerationConfig.from_pretrained(self.path, local_files_only=True)
            else:
                settings = GenerationConfig.from_model_config(self.config)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model folder '{self.path}': generation_config.json: {line_of(error)}") from None
        listed = settings.eos_token_id
        ends = listed if isinstance(listed, list) else [listed]
        return frozenset(token for token in (*ends, self.tokenizer.eos_token_id) if token is not None)

    @functools.cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> safetensors file name."""
        index = self.path / INDEX
        if index.is_file():
            return self._read_index(index)
        single = self.path / "model.safetensors"
        if not single.is_file():
            pickles = sorted(file.name for file in (*self.path.glob("*.bin"), *self.path.glob("*.pt")))
            hint = f"found {pickles[0]}: convert it to safetensors" if pickles else "expected model.safetensors"
            if any(self.path.glob("*.safetensors")):
                hint = f"found shards without their index: expected {index.name}"
            raise UserError(f"model folder '{self.path}': no weights; {hint}")
        return dict.fromkeys(self._header(single.name), single.name)

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # Plain file names: an index from elsewhere must not lead outside its folder.
            if all(Path(file).name == file for file in weight_map.values()):
                return dict(weight_map)
            reason = "a shard is not the name of a file in this folder"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {line_of(error)}"
        raise UserError(f"model folder '{self.path}': {index.name} has no usable weight_map: {reason}")

    def names(self) -> set[str]:
        """Names of all tensors, including those that a file holds but the index does not name."""
        return set(self.weight_map).union(*(self._header(file) for file in set(self.weight_map.values())))

    def info(self, name: str) -> TensorInfo | None:
        """Dtype and shape of a tensor, read from the file's header; None if the folder has no such tensor."""
        if name not in self.weight_map:
            return None
        file = self.weight_map[name]
        if name not in self._header(file):
            raise UserError(f"model folder '{self.path}': the index puts tensor {name} in {file}, which lacks it")
        return self._header(file)[name]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in.

        The file is reopened each time: what was read from a mapped file counts as this process's memory until it is
        closed.
        """
        with self._open(self.weight_map[name]) as file:
            found: Tensor = file.get_tensor(name)
            return found

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Read rows of a tensor, from row `start` on, into `target` (contiguous, of the tensor's dtype), with no more
        of the file in memory than that."""
        info = self.info(name)
        assert info is not None, name
        assert (target.dtype, target.shape[1:]) == (info.dtype, info.shape[1:]), (
            f"{target.dtype} {target.shape}, {info}"
        )
        data = target.view(-1).view(torch.uint8).numpy().data
        path = self.path / self.weight_map[name]
        with path.open("rb", buffering=0) as file:
            file.seek(info.offset + start * info.nbytes // max(1, info.shape[0]))
            while data:
                count = file.readinto(data)
                if not count:
                    raise UserError(f"model folder '{self.path}': {path.name} is cut short; copy it again")
                data = data[count:]

    @functools.cache  # noqa: B019  headers are small, and a folder object lives as long as its job
    def _header(self, file: str) -> dict[str, TensorInfo]:
        with self._open(file) as opened:  # which checks the header
            dtypes = {name: _dtype(opened, name) for name in opened.keys()}  # noqa: SIM118  not a dict
        with (self.path / file).open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
        return {
            name: TensorInfo(name, dtype, tuple(header[name]["shape"]), 8 + length + header[name]["data_offsets"][0])
            for name, dtype in dtypes.items()
        }

    def _open(self, file: str) -> Any:
        if not (self.path / file).is_file():
            raise UserError(f"model folder '{self.path}': the index names {file}, which is missing; copy it again")
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"model folder '{self.path}': {file} cannot be read: {line_of(error)}") from None


def _dtype(file: Any, name: str) -> torch.dtype:
    part = file.get_slice(name)
    found: torch.dtype = (part[:0] if part.get_shape() else file.get_tensor(name)).dtype
    return found
