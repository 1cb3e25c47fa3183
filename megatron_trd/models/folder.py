"""A Hugging Face model folder on disk: configuration, tokenizer, and tensors read one at a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_trd.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelFolder:
    """Reads `config.json`, the tokenizer and the safetensors of a local folder, each when it is asked for.

    Raises `UserError` for a folder, configuration, index or shard that is missing or broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"model folder '{path}': no such folder; give a local Hugging Face folder (model=DIR)")
        if not (self.path / "config.json").is_file():
            raise UserError(f"model folder '{path}': no config.json; this is not a Hugging Face model folder")

    @functools.cached_property
    def config(self) -> Any:
        """The folder's `transformers` configuration."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for fields it cannot use
            raise UserError(f"model folder '{self.path}': config.json cannot be read: {_in_one_line(error)}") from None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        from transformers import AutoTokenizer

        if not any((self.path / file).is_file() for file in _TOKENIZER_FILES):  # transformers would make an empty one
            raise UserError(f"model folder '{self.path}': no tokenizer; expected {' or '.join(_TOKENIZER_FILES)}")
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # as above
            raise UserError(f"model folder '{self.path}': no usable tokenizer: {_in_one_line(error)}") from None

    @functools.cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> safetensors file name."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return self._read_index(index)
        single = self.path / "model.safetensors"
        if not single.is_file():
            pickles = sorted(file.name for file in (*self.path.glob("*.bin"), *self.path.glob("*.pt")))
            hint = f"found {pickles[0]}: convert it to safetensors" if pickles else "expected model.safetensors"
            if any(self.path.glob("*.safetensors")):
                hint = f"found shards without their index: expected {index.name}"
            raise UserError(f"model folder '{self.path}': no weights; {hint}")
        return dict.fromkeys(self._open(single.name).keys(), single.name)

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # Plain file names: an index from elsewhere must not lead outside its folder.
            if all(Path(file).name == file for file in weight_map.values()):
                return dict(weight_map)
            reason = "a shard is not the name of a file in this folder"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {_in_one_line(error)}"
        raise UserError(f"model folder '{self.path}': {index.name} has no usable weight_map: {reason}")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, read from the file's header; None if the folder has no such tensor."""
        if name not in self.weight_map:
            return None
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in."""
        return self._open(self.weight_map[name]).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is stored in."""
        return self._slice(name)[:0].dtype

    def _slice(self, name: str) -> Any:
        file = self.weight_map[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise UserError(
                f"model folder '{self.path}': the index puts tensor {name} in {file}, which lacks it"
            ) from None

    @functools.cache  # noqa: B019  one handle a file, for the life of the folder
    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"model folder '{self.path}': {file} cannot be read: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
