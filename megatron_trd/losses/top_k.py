"""The divergence on the teacher's k most probable tokens of the whole vocabulary, wherever their columns are.

Each rank sends the logits of its own k best columns once; every rank then ranks the same candidates, and the rest is
the ordinary divergence on k columns that all ranks hold. Equal logits go by the lower index, so every sharding of the
same logits picks the same tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_trd.losses.objective import Objective
from megatron_trd.losses.rows import PendingRows, start_rows_
from megatron_trd.losses.shard import Gathering, VocabShard
from megatron_trd.losses.torch_kernels import blocks


class _Kept(NamedTuple):
    student: Tensor  # [rows, k] logits, the same on every rank
    teacher: Tensor
    column: Tensor  # [rows, k] where each is here; 0 where it is another rank's
    here: Tensor  # [rows, k] whether it is here


class PendingRestrictedRows(NamedTuple):
    """Rows whose candidates are on their way between the ranks."""

    student: Tensor
    columns: Tensor  # [rows, k] of this rank's candidates
    shard: VocabShard
    objective: Objective
    candidates: Gathering  # [ranks, 2, rows, k] logits of student and teacher

    def finish(self, scale: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """As `PendingRows.finish`, on the kept columns; the gradient is 0 elsewhere."""
        kept = self._keep()
        on_kept = replace(self.objective, top_k=None)
        whole = VocabShard.whole(kept.column.shape[1])
        rows = start_rows_(kept.student, kept.teacher, whole, on_kept)
        divergence, gradient = rows.finish(scale, None if dtype is None else self.student.dtype)
        if gradient is None:
            return divergence, None
        if self.shard.columns > 0:
            self.student.zero_().scatter_add_(1, kept.column, gradient.masked_fill_(~kept.here, 0))
        return divergence, self.student

    def _keep(self) -> _Kept:
        k = self.columns.shape[1]
        # [rows, ranks * k]: by rank, then by each rank's order, hence by index among equals; the sort keeps that.
        student_all, teacher_all = self.candidates.wait().permute(1, 2, 0, 3).flatten(start_dim=2)
        place = torch.sort(teacher_all, dim=1, descending=True, stable=True).indices[:, :k]
        here = place // k == self.shard.rank
        column = self.columns.gather(1, place % k).masked_fill_(~here, 0)
        return _Kept(student_all.gather(1, place), teacher_all.gather(1, place), column, here)


def start_divergence_(
    student: Tensor, teacher: Tensor, shard: VocabShard, objective: Objective
) -> PendingRows | PendingRestrictedRows:
    """`start_rows_`, on the teacher's `objective.top_k` best columns where that is set; same arguments."""
    if objective.top_k is None or objective.top_k >= shard.vocabulary:
        return start_rows_(student, teacher, shard, objective)
    rows, k = student.shape[0], objective.top_k
    # Slots beyond a short shard's columns are never picked: -inf loses to every logit, and k real ones exist.
    candidates = student.new_full((2, rows, k), -torch.inf)
    columns = torch.zeros(rows, k, dtype=torch.int64, device=student.device)
    held = min(k, shard.columns)
    if held > 0:
        for block in blocks(rows, teacher.shape[1] * teacher.element_size(), teacher.device):
            columns[block, :held] = _best_columns(teacher[block], held)
        torch.gather(student, 1, columns[:, :held], out=candidates[0, :, :held])
        torch.gather(teacher, 1, columns[:, :held], out=candidates[1, :, :held])
    return PendingRestrictedRows(student, columns, shard, objective, shard.start_gather(candidates))


def _best_columns(logits: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, `[rows, k]`, largest first and lower index first among equals.

    `topk` breaks ties as it likes, and bf16 logits tie often. Those strictly above the k-th value are right whatever it
    did; the rest are the first columns that equal the k-th value, found by a second `topk` on their indices.
    """
    columns = logits.shape[1]
    values, indices = logits.topk(k, dim=1)
    threshold = values[:, -1:]
    position = torch.arange(columns, dtype=torch.int32, device=logits.device)
    tied = torch.where(logits == threshold, -position, -columns).topk(k, dim=1).values.neg().long()
    above = (~(values <= threshold)).sum(dim=1, keepdim=True)  # so written, NaN is above: it must come out as NaN
    slot = torch.arange(k, device=logits.device)
    chosen = torch.where(slot < above, indices, tied.gather(1, (slot - above).clamp(min=0)))
    chosen = chosen.sort(dim=1).values
    order = torch.sort(logits.gather(1, chosen), dim=1, descending=True, stable=True).indices
    return chosen.gather(1, order)
