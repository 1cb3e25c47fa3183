"""Hugging Face folder -> Megatron distributed checkpoint.

    python -m checkpoint_tools.hf_to_megatron --hf DIR --out DIR [--dtype bf16]

The output loads at any TP x PP x EP layout. It keeps the folder's configuration and tokenizer in `hf/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

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
from megatron_trd.files import checked, whole_folder, write_sums
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.dist_checkpoint import CheckpointWriter, write_states
from megatron_trd.models.export import copy_companions, exported_tensors, main_dtype
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder, check_tokenizer, folder_pieces
from megatron_trd.models.megatron_folder import COMPANIONS
from megatron_trd.models.weights import exported_slots, slots


def command(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder with safetensors")],
    out: Annotated[Path, typer.Option(help="folder of the new checkpoint")],
    dtype: DtypeOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Convert a Hugging Face folder into a Megatron distributed checkpoint."""
    convert(hf, out, dtype=parse_dtype(dtype), force=force, dry_run=dry_run)


def convert(
    hf: Path, out: Path, *, dtype: torch.dtype | None = None, force: bool = False, dry_run: bool = False
) -> None:
    """Write `out` whole or not at all. Raises `UserError` for bad input; then nothing is written."""
    folder = ModelFolder(hf)
    arch = read_architecture(folder)
    check_folder(folder, arch)
    if folder.has_tokenizer:  # weights alone are a model too
        check_tokenizer(folder, arch)
    check_places(out, hf)
    dtypes = dict.fromkeys((slot.key for slot in slots(arch)), dtype) if dtype else _stored_dtypes(folder, arch)
    exported = exported_slots(arch)
    if dry_run:
        print_mapping(arch, lambda slot: dtypes[slot.key])
        return
    size = sum(slot.size * dtypes[slot.key].itemsize for slot in exported)
    with summary(out, sum(len(slot.hf) for slot in exported), size), whole_folder(out, size=size, force=force) as new:
        writer = CheckpointWriter(new)
        write_states(writer, arch)
        with checked(hf), progress(f"{hf} -> {out}", size) as advance:
            for slot in exported:
                row = 0
                for piece in folder_pieces(folder, slot, arch, dtypes[slot.key]):
                    writer.add(slot.key, (*slot.stack, *slot.whole), slot.index, piece, row)
                    row += len(piece)
                    advance(piece.nbytes)
        (new / COMPANIONS).mkdir()
        stored = main_dtype(exported_tensors(arch, lambda slot: dtypes[slot.key]))
        copy_companions(folder, new / COMPANIONS, stored)
        writer.close()
        write_sums(new, writer.digests)


def _stored_dtypes(folder: ModelFolder, arch: Architecture) -> dict[str, torch.dtype]:
    """Key of a stacked tensor -> dtype of its parts, which must all have the same."""
    dtypes: dict[str, torch.dtype] = {}
    for slot in slots(arch):
        for name in slot.hf:
            info = folder.info(name)
            assert info is not None, name
            if dtypes.setdefault(slot.key, info.dtype) != info.dtype:
                raise UserError(
                    f"model folder '{folder.path}': {name} is {info.dtype}, the same tensor of other layers "
                    f"{dtypes[slot.key]}: name one for all (--dtype bf16)"
                )
    return dtypes


if __name__ == "__main__":
    run(command, "checkpoint_tools.hf_to_megatron")
