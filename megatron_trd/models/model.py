"""A model on disk, in either form that a run can start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.dist_checkpoint import is_checkpoint
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import Source, check_folder, folder_source
from megatron_trd.models.megatron_folder import MegatronFolder
from megatron_trd.models.weights import Slot


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder, or a Megatron distributed checkpoint with its `hf/` beside it."""

    path: Path
    folder: ModelFolder  # configuration and tokenizer
    arch: Architecture
    source: Source  # full tensors

    def check(self) -> None:
        """Raise `UserError` if a tensor is missing, unknown or of a wrong shape. Reads headers only."""
        if self.path == self.folder.path:  # a checkpoint is checked when it is opened
            check_folder(self.folder, self.arch)

    def with_vocabulary(self, size: int) -> Model:
        """This model without the rows of embedding and head beyond the first `size`, which belong to no token."""
        if size == self.arch.vocab_size:
            return self

        def first_rows(slot: Slot) -> list[Tensor]:
            return [tensor[:size] if slot.kind == "vocab" else tensor for tensor in self.source(slot)]

        return replace(self, arch=replace(self.arch, vocab_size=size), source=first_rows)


def open_model(path: str | Path) -> Model:
    """Open either form. Raises `UserError` for one that is missing, broken or not supported."""
    if is_checkpoint(Path(path)):
        checkpoint = MegatronFolder(path)
        return Model(checkpoint.path, checkpoint.companions, checkpoint.arch, checkpoint.source)
    folder = ModelFolder(path)
    return Model(folder.path, folder, read_architecture(folder), folder_source(folder))
