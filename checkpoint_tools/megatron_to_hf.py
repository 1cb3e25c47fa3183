"""Megatron distributed checkpoint -> Hugging Face folder.

    python -m checkpoint_tools.megatron_to_hf --megatron DIR --out DIR [--max-shard-size 5GB] [--weights ema|adapters]

The checkpoint may be of any layout: one that `hf_to_megatron` wrote, a training run's `checkpoints/step_N`, or
megatron-core's own (with `--like` for its configuration and tokenizer).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.filesize import decimal
from torch import Tensor

from checkpoint_tools.common import (
    DryRunOption,
    DtypeOption,
    ForceOption,
    check_places,
    parse_dtype,
    print_mapping,
    progress,
    run,
    summary,
)
from megatron_trd.errors import UserError
from megatron_trd.files import checked, whole_folder
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.export import MAX_SHARD_BYTES, FolderWriter, exported_tensors, main_dtype
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder, check_tokenizer, exported_pieces, folder_pieces
from megatron_trd.models.lora import all_adapter_slots
from megatron_trd.models.megatron_folder import MegatronFolder
from megatron_trd.models.peft_format import write_adapters
from megatron_trd.models.weights import Slot, exported_slots

_WEIGHTS_HELP = "model; ema: the averaged teacher of a run; adapters: those of a run with lora.rank, in PEFT's format"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def command(
    megatron: Annotated[Path, typer.Option(help="Megatron distributed checkpoint, e.g. checkpoints/step_100 of a run")],
    out: Annotated[Path, typer.Option(help="new Hugging Face folder")],
    max_shard_size: Annotated[str, typer.Option(help="of one safetensors file, e.g. 500MB")] = "5GB",
    dtype: DtypeOption = None,
    weights: Annotated[str, typer.Option(help=_WEIGHTS_HELP)] = "model",
    like: Annotated[Path | None, typer.Option(help="Hugging Face folder with config.json and tokenizer to use")] = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Convert a Megatron distributed checkpoint into a Hugging Face folder."""
    convert(
        megatron,
        out,
        max_shard_bytes=parse_size(max_shard_size),
        dtype=parse_dtype(dtype),
        weights=weights,
        like=like,
        force=force,
        dry_run=dry_run,
    )


def convert(
    megatron: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    weights: str = "model",
    like: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Write `out` whole or not at all. Raises `UserError` for bad input; then nothing is written."""
    check_places(out, megatron, like)
    if weights == "adapters":
        _convert_adapters(MegatronFolder(megatron, like), out, dtype, force=force, dry_run=dry_run)
        return
    source = _open(megatron, weights, like, dtype)
    if source.companions.has_tokenizer:  # weights alone are a model too
        check_tokenizer(source.companions, source.arch)
    infos = exported_tensors(source.arch, lambda slot: dtype or source.dtype(slot))
    if dry_run:
        print_mapping(source.arch, lambda slot: dtype or source.dtype(slot))
        return
    size = sum(info.nbytes for info in infos)
    with summary(out, len(infos), size), whole_folder(out, size=size, force=force) as new:
        writer = FolderWriter(new, infos, max_shard_bytes)
        with checked(megatron), progress(f"{megatron} -> {out}", size) as advance:
            for slot in exported_slots(source.arch):
                for name, piece in source.pieces(slot):
                    piece = piece.to(dtype or piece.dtype)
                    writer.write(name, piece)
                    advance(piece.nbytes)
        writer.close(source.companions, main_dtype(infos))


def _convert_adapters(
    checkpoint: MegatronFolder, out: Path, dtype: torch.dtype | None, *, force: bool, dry_run: bool
) -> None:
    """Write the adapters of a checkpoint, without the weights that they are for."""
    config, arch, reader = checkpoint.adapters, checkpoint.arch, checkpoint.reader
    if config is None:
        raise UserError(f"checkpoint '{checkpoint.path}' has no adapters; leave --weights out for the whole model")
    slots = all_adapter_slots(arch, config.lora.rank)
    kept = dtype or reader.dtype(slots[0].key)
    size = sum(slot.size for slot in slots) * kept.itemsize
    if dry_run:
        print(f"{len(slots)} tensors, {decimal(size)}, {kept}, for '{config.base}'")
        return
    with summary(out, len(slots), size), whole_folder(out, size=size, force=force) as new, checked(checkpoint.path):
        write_adapters(new, config, arch, lambda slot: reader.read(slot.key, slot.index).to(kept))


@dataclass(frozen=True)
class _Source:
    """Source of the tensors: the checkpoint itself, or the folder of an averaged teacher in it."""

    companions: ModelFolder
    arch: Architecture
    dtype: Callable[[Slot], torch.dtype]
    pieces: Callable[[Slot], Iterator[tuple[str, Tensor]]]


def _open(megatron: Path, weights: str, like: Path | None, wanted: torch.dtype | None) -> _Source:
    if weights == "model":
        checkpoint = MegatronFolder(megatron, like)
        reader = checkpoint.reader
        merged = functools.partial(checkpoint.pieces, dtype=wanted)  # adapters are not rounded before they are cast
        return _Source(checkpoint.companions, checkpoint.arch, lambda slot: reader.dtype(slot.key), merged)
    if weights != "ema":
        raise UserError(f"--weights {weights} is not known; use model, ema or adapters")
    if not (megatron / "ema").is_dir():
        raise UserError(f"checkpoint '{megatron}' has no averaged teacher (ema/); leave --weights out for the student")
    folder = ModelFolder(megatron / "ema")
    arch = read_architecture(folder)
    check_folder(folder, arch)

    def dtype(slot: Slot) -> torch.dtype:
        info = folder.info(slot.hf[0])
        assert info is not None, slot
        return info.dtype

    def pieces(slot: Slot) -> Iterator[tuple[str, Tensor]]:
        return exported_pieces(folder_pieces(folder, slot, arch, dtype(slot)), slot, arch)

    return _Source(folder, arch, dtype, pieces)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MiB. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    if not match or (match[2] or "") not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text} is not a size; write it like 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


if __name__ == "__main__":
    run(command, "checkpoint_tools.megatron_to_hf")
