"""Weights in and out of running models: shards from a source, and full tensors gathered from shards.

A `Source` gives the full Hugging Face tensors of a slot, from a folder, a distributed checkpoint, or a model sharded
over a grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_trd.errors import UserError
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.dist_checkpoint import PIECE_BYTES, CheckpointReader
from megatron_trd.models.folder import WEIGHT_DTYPES, ModelFolder
from megatron_trd.models.weights import Piece, Slot, exported_slots, merge, parts, shard, slots, uncut
from megatron_trd.parallel.grid import Grid

# Gives the full Hugging Face tensors of a slot.
Source = Callable[[Slot], list[Tensor]]


@runtime_checkable
class PiecewiseSource(Protocol):
    """A `Source` that can also give the tensors in pieces, without assembling them."""

    def __call__(self, slot: Slot) -> list[Tensor]: ...

    def pieces(self, slot: Slot) -> list[Piece]: ...


def piecewise(source: Source) -> Callable[[Slot], list[Piece]]:
    """Gives the full tensors of a slot, in pieces if `source` has them in pieces."""
    return source.pieces if isinstance(source, PiecewiseSource) else lambda slot: uncut(source(slot))


def folder_source(folder: ModelFolder) -> Source:
    """Read slots from a Hugging Face folder."""
    return lambda slot: [folder.tensor(name) for name in slot.hf]


def checkpoint_source(reader: CheckpointReader, arch: Architecture) -> Source:
    """Read slots from a megatron-core distributed checkpoint of any layout."""

    def read(slot: Slot) -> list[Tensor]:
        key = slot.key if slot.exported else slots(arch)[0].key  # the tied head: its one tensor is the embedding
        return merge(slot, [reader.read(key, slot.index)], arch)

    return read


def folder_pieces(folder: ModelFolder, slot: Slot, arch: Architecture, dtype: torch.dtype) -> Iterator[Tensor]:
    """A slot's Megatron parameter at TP1 without padding, in `dtype`, in consecutive pieces of rows from a folder."""
    segments = parts(slot, arch, 0, 1)
    rows, *row = slot.whole
    limit = max(1, PIECE_BYTES // (torch.Size(row).numel() * dtype.itemsize))
    for begin in range(0, rows, limit):
        piece = torch.empty((min(limit, rows - begin), *row), dtype=dtype)
        for part, start, offset, count in _overlap(segments, begin, len(piece)):
            target, info = piece[offset : offset + count], folder.info(slot.hf[part])
            assert info is not None, slot
            stored = target if info.dtype == dtype else torch.empty_like(target, dtype=info.dtype)
            folder.read_rows(slot.hf[part], start, stored)
            if stored is not target:
                target.copy_(stored)
        yield piece


def _overlap(segments: list[tuple[int, int, int]], begin: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """The ranges of `parts` in rows `[begin, begin + rows)`: (tensor, its row, row after `begin`, number of rows)."""
    row = 0
    for part, start, count in segments:
        first, last = max(row, begin), min(row + count, begin + rows)
        if first < last:
            yield part, start + first - row, first - begin, last - first
        row += count


def exported_pieces(pieces: Iterable[Tensor], slot: Slot, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Consecutive pieces of rows of a slot's parameter at TP1 -> (Hugging Face name, next rows), without padding.

    Rows of a slot with one tensor are passed on at once; q, k and v or gate and up are kept until the slot is complete.
    """
    if len(slot.hf) == 1:
        row = 0
        for piece in pieces:
            if row < slot.whole[0]:
                yield slot.hf[0], piece[: slot.whole[0] - row]
            row += len(piece)
        return
    found: list[list[Tensor]] = [[] for _ in slot.hf]
    row = 0
    for piece in pieces:
        for part, _, offset, count in _overlap(parts(slot, arch, 0, 1), row, len(piece)):
            found[part].append(piece[offset : offset + count])
        row += len(piece)
    for name, rows in zip(slot.hf, found, strict=True):
        yield from ((name, tensor) for tensor in rows)


# Buffers in old checkpoints, which `transformers` recomputes.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


def check_folder(folder: ModelFolder, arch: Architecture) -> None:
    """Raise `UserError` naming the first tensor that is missing, unknown, or of a wrong shape. Reads file headers only.

    The head of a tied model may be stored as well, if it equals the embedding.
    """
    table = slots(arch)
    where = f"model folder '{folder.path}'"
    for slot in table:
        for name, expected in zip(slot.hf, slot.shapes, strict=True):
            found = folder.info(name)
            if found is None:
                raise UserError(f"{where}: tensor {name} is missing; the download is not whole")
            if found.dtype not in WEIGHT_DTYPES:
                raise UserError(f"{where}: tensor {name} is {found.dtype}: only plain weights are supported")
            if found.shape != expected:
                raise UserError(
                    f"{where}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(expected)}"
                )
    known = {name for slot in table for name in slot.hf}
    extra = sorted(name for name in folder.names() - known if not _COMPUTED.search(name))
    if extra == ["lm_head.weight"] and arch.tied:
        if not _same(folder, table[0], replace(table[0], hf=(extra[0],)), arch):
            raise UserError(
                f"{where}: config.json ties the head to the embedding, but lm_head.weight differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false or remove lm_head.weight"
            )
    elif extra:
        raise UserError(
            f"{where}: tensor {extra[0]} is not one of {arch.family} as config.json describes it "
            f"({len(extra)} such); give a folder of that architecture alone"
        )


def check_tokenizer(folder: ModelFolder, arch: Architecture) -> None:
    """Raise `UserError` if the tokenizer has tokens for which the model has no embedding."""
    largest = max(folder.tokenizer.get_vocab().values(), default=-1)
    if largest >= arch.vocab_size:
        raise UserError(
            f"model folder '{folder.path}': the tokenizer has a token {largest}, the last of config.json's "
            f"vocabulary is {arch.vocab_size - 1}: take the tokenizer that belongs to the model"
        )


def _same(folder: ModelFolder, left: Slot, right: Slot, arch: Architecture) -> bool:
    """Whether two slots have the same bits."""
    first, second = folder.info(left.hf[0]), folder.info(right.hf[0])
    if first is None or second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pieces = (folder_pieces(folder, slot, arch, first.dtype) for slot in (left, right))
    return all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(*pieces, strict=True))


@torch.no_grad()
def load(
    named: Mapping[str, Tensor],
    arch: Architecture,
    grid: Grid,
    source: Source,
    *,
    table: Sequence[Slot] | None = None,
    decay: float = 0.0,
    all_slots: bool = False,
) -> None:
    """Fill this rank's tensors, named as by `local_parameters`: `tensor <- decay * tensor + (1 - decay) * source`.

    `table`: the slots to fill, if not the whole model's. `all_slots`: request every slot from `source` in order,
    required if it is collective; otherwise only local ones.
    """
    for slot in slots(arch) if table is None else table:
        tensor = find(slot, named)
        if tensor is None and not all_slots:
            continue
        full = source(slot)
        if tensor is None:
            continue
        part = shard(slot, full, arch, *grid.tensor_rank(expert=slot.expert is not None)).to(tensor)
        tensor.copy_(part) if decay == 0.0 else tensor.lerp_(part, 1.0 - decay)


_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


def local_parameters(model: torch.nn.Module, arch: Architecture, grid: Grid) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their Megatron name with global layer and expert indices."""
    layers = grid.pp_rank * (arch.layers // grid.layout.pp)
    experts = grid.ep_rank * (arch.experts // grid.layout.ep)
    named = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if name.startswith("decoder.layers."):
            index, _, rest = name.removeprefix("decoder.layers.").partition(".")
            rest = _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + experts}", rest)
            name = f"decoder.layers.{int(index) + layers}.{rest}"
        named[name] = parameter
    return named


def find(slot: Slot, named: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter of a slot on this rank, whichever layer spec it was built with."""
    return next((named[name] for name in slot.megatron if name in named), None)


def named_tensors(arch: Architecture, source: Source) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of the whole model, one slot at a time."""
    for slot in exported_slots(arch):
        yield from zip(slot.hf, source(slot), strict=True)
