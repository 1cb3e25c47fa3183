"""Proves that a Hugging Face folder and a Megatron distributed checkpoint are the same model.

    python -m checkpoint_tools.verify --hf DIR --megatron DIR [--logits]

Compares the checksum of every tensor, bit for bit (after a cast, where the two have another dtype), and with `--logits`
what `transformers` and megatron-core compute from the two on sample text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from checkpoint_tools.common import pattern, progress, run
from checkpoint_tools.logits import compare_logits
from megatron_trd.files import check_sums
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder
from megatron_trd.models.megatron_folder import MegatronFolder
from megatron_trd.models.weights import exported_slots

_LISTED = 10  # names of tensors that differ


def command(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder")],
    megatron: Annotated[Path, typer.Option(help="Megatron distributed checkpoint")],
    logits: Annotated[bool, typer.Option("--logits", help="run both models on sample text too")] = False,
    like: Annotated[Path | None, typer.Option(help="configuration for a checkpoint that has none")] = None,
) -> None:
    """Compare a Hugging Face folder with a Megatron distributed checkpoint; exit code 1 if they differ."""
    if not verify(hf, megatron, logits=logits, like=like):
        raise typer.Exit(1)


@dataclass
class _Row:
    """Tensors of the same name in all layers."""

    tensors: int = 0
    values: int = 0
    cast: str = ""
    different: list[str] = field(default_factory=list)


def verify(hf: Path, megatron: Path, *, logits: bool = False, like: Path | None = None) -> bool:
    """Print a table and a verdict; returns whether the two are the same model. Raises `UserError` for bad input."""
    folder, checkpoint = ModelFolder(hf), MegatronFolder(megatron, like)
    check_sums(hf)
    check_sums(megatron)
    checkpoint.reader.check_objects()
    check_folder(folder, checkpoint.arch)
    rows = _compare(folder, checkpoint)
    _print(rows)
    same = not any(row.different for row in rows.values())
    verdict = f"{sum(row.tensors for row in rows.values())} tensors, all the same bits"
    if not same:
        different = [name for row in rows.values() for name in row.different]
        verdict = f"{len(different)} tensors differ: {', '.join(different[:_LISTED])}" + " …" * (
            len(different) > _LISTED
        )
    other = _other_fields(read_architecture(folder), checkpoint.arch)
    if other:
        same = False
        verdict += f"; config.json differs in {', '.join(other)}"
    if logits:
        close, line = compare_logits(folder, checkpoint)
        same = same and close
        verdict += f"; {line}"
    print(("SAME: " if same else "DIFFERENT: ") + verdict)
    return same


def _other_fields(left: Architecture, right: Architecture) -> list[str]:
    return [field.name for field in fields(left) if getattr(left, field.name) != getattr(right, field.name)]


def _compare(folder: ModelFolder, checkpoint: MegatronFolder) -> dict[str, _Row]:
    exported = exported_slots(checkpoint.arch)
    rows: dict[str, _Row] = defaultdict(_Row)
    total = sum(info.nbytes for info in map(folder.info, (name for slot in exported for name in slot.hf)) if info)
    with progress(f"{folder.path} = {checkpoint.path}", total) as advance:
        for slot in exported:
            dtype = checkpoint.reader.dtype(slot.key)
            for name, found in _digests(checkpoint.pieces(slot)).items():
                info = folder.info(name)
                assert info is not None, name
                # read by name, independently of the mapping that is to be verified
                stored = folder.tensor(name)
                row = rows[pattern(name)]
                row.tensors += 1
                row.values += torch.Size(info.shape).numel()
                if info.dtype != dtype:
                    row.cast = f"{info.dtype} as {dtype}".replace("torch.", "")
                if _digests([(name, stored.to(dtype))])[name] != found:
                    row.different.append(name)
                advance(info.nbytes)
    return rows


def _digests(pieces: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> SHA-256 of the values' bytes, independent of the pieces they come in."""
    hashes: dict[str, hashlib._Hash] = {}
    for name, piece in pieces:
        data = piece.contiguous().view(-1).view(torch.uint8)
        hashes.setdefault(name, hashlib.sha256()).update(data.numpy().data)
    return {name: value.hexdigest() for name, value in hashes.items()}


def _print(rows: dict[str, _Row]) -> None:
    table = Table("tensor", "count", "values", "cast", "verdict", title="Hugging Face = Megatron", title_justify="left")
    for name, row in rows.items():
        verdict = f"{len(row.different)} differ" if row.different else "same"
        table.add_row(name, str(row.tensors), f"{row.values:,}", row.cast, verdict)
    Console().print(table)


if __name__ == "__main__":
    run(command, "checkpoint_tools.verify")
