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


class ModelFolder:
    """Reads `config.json`, the tokenizer and the safetensors of a local folder. Nothing is loaded before it is asked for.

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
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"model folder '{self.path}': config.json cannot be read: {_first_line(error)}") from None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"model folder '{self.path}': no usable tokenizer: {_first_line(error)}") from None

    @functools.cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> safetensors file name."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return dict(json.loads(index.read_text())["weight_map"])
        single = self.path / "model.safetensors"
        if not single.is_file():
            pickles = sorted(file.name for file in (*self.path.glob("*.bin"), *self.path.glob("*.pt")))
            hint = f"found {pickles[0]}: convert it to safetensors" if pickles else "expected model.safetensors"
            raise UserError(f"model folder '{self.path}': no weights; {hint}")
        return dict.fromkeys(self._open(single.name).keys(), single.name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, read from the file's header; None if the folder has no such tensor."""
        if name not in self.weight_map:
            return None
        return tuple(self._open(self.weight_map[name]).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in."""
        return self._open(self.weight_map[name]).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is stored in."""
        return self._open(self.weight_map[name]).get_slice(name)[:0].dtype

    @functools.cache  # noqa: B019  one handle a file, for the life of the folder
    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"model folder '{self.path}': {file} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
