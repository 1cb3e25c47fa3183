"""A model as a Megatron distributed checkpoint, with the Hugging Face configuration and tokenizer that belong to it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_trd import platform
from megatron_trd.errors import UserError
from megatron_trd.files import check_small_sums
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.dist_checkpoint import CheckpointReader
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import Source, checkpoint_source, exported_pieces
from megatron_trd.models.lora import AdaptedSource, adapter_slots, all_adapter_slots
from megatron_trd.models.peft_format import read_config
from megatron_trd.models.weights import Slot, exported_slots

COMPANIONS = "hf"  # subfolder with config.json and tokenizer
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")  # other tensors are the optimizer's


class MegatronFolder:
    """Opens a checkpoint of any layout. Raises `UserError` if it is incomplete or not of the architecture it declares.

    Adapters, if it has any (`adapters`), are merged into the weights that are read from it.

    `like`: a Hugging Face folder with configuration and tokenizer, for a checkpoint without its own.
    """

    def __init__(self, path: str | Path, like: Path | None = None) -> None:
        self.path = Path(path)
        # before they are parsed; the weights are compared when all of them are read
        check_small_sums(self.path)
        self.reader = CheckpointReader(self.path)
        if like is None and not (self.path / COMPANIONS / "config.json").is_file():
            raise UserError(
                f"checkpoint '{path}' has no {COMPANIONS}/config.json beside its weights: name a Hugging Face folder "
                "with the model's configuration and tokenizer (--like DIR)"
            )
        self.companions = ModelFolder(like or self.path / COMPANIONS)
        self.arch: Architecture = read_architecture(self.companions)
        self.adapters = read_config(self.path / COMPANIONS)
        self._check()

    def _check(self) -> None:
        where = f"checkpoint '{self.path}'"
        adapters = all_adapter_slots(self.arch, self.adapters.lora.rank) if self.adapters else []
        expected = {slot.key: (*slot.stack, *slot.whole) for slot in (*exported_slots(self.arch), *adapters)}
        vocabularies = {slot.key for slot in exported_slots(self.arch) if slot.kind == "vocab"}
        for key, shape in expected.items():
            found = self.reader.size(key)
            if found is None:
                raise UserError(f"{where}: tensor {key} is missing; it is not {self.arch.family} as config.json has it")
            if key in vocabularies and found[1:] == shape[1:] and found[0] > shape[0]:
                self._check_padding(key, found[0])
            elif found != shape:
                raise UserError(f"{where}: tensor {key} has shape {list(found)}, config.json asks for {list(shape)}")
        extra = sorted(key for key in self.reader.keys() - expected.keys() if key.startswith(_OF_THE_MODEL))
        if extra:
            raise UserError(
                f"{where}: tensor {extra[0]} is not one of {self.arch.family} as config.json describes it "
                f"({len(extra)} such)"
            )

    def _check_padding(self, key: str, rows: int) -> None:
        """Rows beyond the vocabulary are left out: refuse them if they may be tokens."""
        # The checkpoint was padded for the TP it was saved with, which divides the heads.
        sizes = (self.arch.padded_vocab(tp) for tp in range(1, self.arch.heads + 1) if self.arch.heads % tp == 0)
        if rows not in sizes:
            raise UserError(
                f"checkpoint '{self.path}': tensor {key} has {rows} rows, config.json a vocabulary of "
                f"{self.arch.vocab_size}, and padding does not explain the difference: take the config.json that "
                f"belongs to these weights (--like DIR), or set its vocab_size to {rows}"
            )

    @functools.cached_property
    def source(self) -> Source:
        """Full Hugging Face tensors of a slot."""
        return self._source(None)

    def _source(self, dtype: torch.dtype | None) -> Source:
        read = checkpoint_source(self.reader, self.arch)
        return AdaptedSource(read, read, self.arch, self.adapters.lora, dtype) if self.adapters else read

    def pieces(self, slot: Slot, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, next rows) of a slot, in order; adapters are merged into it in `dtype`, None: its own."""
        if self.adapters and slot in adapter_slots(self.arch, self.adapters.lora.rank):
            return zip(slot.hf, self._source(dtype)(slot), strict=True)
        return exported_pieces(self.reader.pieces(slot.key, slot.index), slot, self.arch)


def load_model(path: Path, model: Any) -> None:
    """Load a checkpoint with megatron-core itself, into a model of any layout that has its head, and its adapters.
    Collective.

    Raises `UserError` for a checkpoint that is broken, or holds more than tensors and plain values.
    """
    from megatron.core import dist_checkpointing

    CheckpointReader(path).check_objects()
    with platform.current().megatron():
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))["model"])
