"""The divergence on the teacher's k most probable tokens of the whole vocabulary, wherever their columns are.

Each rank sends the logits of its own k best columns once; every rank then ranks the same candidates, and what remains
is the ordinary divergence on k columns that all ranks hold. Ties go to the lower index, so every sharding of the same
logits picks the same tokens.

With a tail there is one more column, whose logit is the log-sum-exp of all columns that are not kept: the candidates
that lost, and the rest, whose maximum and sum each rank sends along with its candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_trd.losses.objective import Objective
from megatron_trd.losses.rows import PendingRows, start_rows_
from megatron_trd.losses.shard import Gathering, VocabShard
from megatron_trd.losses.torch_kernels import NO_LOGIT, row_blocks, shift_

_SEGMENT = 128  # columns
_WORTH_CUTTING = 4  # times the columns in k segments


class _Tail(NamedTuple):
    """The columns of one side, over all ranks, that are not kept; logits divided by the temperature."""

    lost: Tensor  # [rows, ranks * k] logits of candidates; NO_LOGIT for the kept ones
    maxima: Tensor  # [rows, ranks] of the rest
    maximum: Tensor  # [rows] of all these
    total: Tensor  # [rows] sum of all exp(logit - maximum)

    @classmethod
    def of(cls, values: Tensor, place: Tensor, maxima: Tensor, sums: Tensor) -> _Tail:
        """`values`, `[rows, ranks * k]`, are the candidates, `place` of which are kept; `sums` go with `maxima`."""
        lost = values.scatter(1, place, NO_LOGIT)
        maximum = torch.maximum(lost.amax(dim=1), maxima.amax(dim=1))
        total = (lost - maximum[:, None]).exp_().sum(dim=1) + ((maxima - maximum[:, None]).exp_() * sums).sum(dim=1)
        return cls(lost, maxima, maximum, total)


class _Kept(NamedTuple):
    student: Tensor  # [rows, k] logits over the temperature, the same on every rank; with a tail [rows, k + 1]
    teacher: Tensor
    column: Tensor  # [rows, k] index of each on this rank; 0 if another rank holds it
    here: Tensor  # [rows, k] whether this rank holds it
    tail: _Tail | None  # of the student


class PendingRestrictedRows(NamedTuple):
    """Rows whose candidates are being exchanged between the ranks."""

    student: Tensor  # with a tail: exp(logit - maximum) of this rank's rest, 0 for candidates
    columns: Tensor  # [rows, k] of this rank's candidates
    shard: VocabShard
    objective: Objective
    candidates: Gathering  # [ranks, 2, rows, k] logits of student and teacher; with a tail + 2, for the rest

    def finish(self, scale: Tensor, out: Tensor | None) -> Tensor:
        """Like `PendingRows.finish`, on the kept columns; elsewhere the gradient is 0, or the tail's."""
        kept, k = self._keep(), self.columns.shape[1]
        on_kept = replace(self.objective, temperature=1.0, top_k=None, tail=False)
        rows = start_rows_(kept.student, kept.teacher, VocabShard.whole(kept.student.shape[1]), on_kept)
        kept_scale = scale / self.objective.temperature
        gradient = kept.student  # where it is written
        divergence = rows.finish(kept_scale, None if out is None else gradient)
        if out is None or self.shard.columns == 0:
            return divergence
        whole = out.zero_() if kept.tail is None else self._spread_(kept.tail, gradient[:, k])
        whole.scatter_add_(1, kept.column, gradient[:, :k].masked_fill(~kept.here, 0).to(whole.dtype))
        if whole is not out:
            out.copy_(whole)
        return divergence

    def _keep(self) -> _Kept:
        k, temperature = self.columns.shape[1], self.objective.temperature
        gathered = self.candidates.wait().permute(1, 2, 0, 3)  # [2, rows, ranks, ...]
        # [rows, ranks * k], ordered by rank, then as on each rank, hence by index among ties; the sort preserves that.
        student_all, teacher_all = gathered[..., :k].flatten(start_dim=2)
        place = torch.sort(teacher_all, dim=1, descending=True, stable=True).indices[:, :k]
        here = place // k == self.shard.rank
        column = self.columns.gather(1, place % k).masked_fill_(~here, 0)
        student_all, teacher_all = student_all / temperature, teacher_all / temperature
        student, teacher = student_all.gather(1, place), teacher_all.gather(1, place)
        if not self.objective.tail:
            return _Kept(student, teacher, column, here, None)
        student_tail, teacher_tail = (
            _Tail.of(values, place, rest[..., 0], rest[..., 1])
            for values, rest in zip((student_all, teacher_all), gathered[..., k:], strict=True)
        )
        student, teacher = _with_tail(student, student_tail), _with_tail(teacher, teacher_tail)
        return _Kept(student, teacher, column, here, student_tail)

    def _spread_(self, tail: _Tail, gradient: Tensor) -> Tensor:
        """Spread the gradient of the tail's logit, `[rows]`, over this rank's columns by their shares of the tail."""
        k = self.columns.shape[1]
        rank, held = self.shard.rank, min(k, self.shard.columns)
        gradient = gradient / tail.total
        self.student.mul_((gradient * (tail.maxima[:, rank] - tail.maximum).exp_())[:, None])
        lost = (tail.lost[:, rank * k : rank * k + held] - tail.maximum[:, None]).exp_()
        return self.student.scatter_(1, self.columns[:, :held], lost.mul_(gradient[:, None]))


def _with_tail(kept: Tensor, tail: _Tail) -> Tensor:
    """`[rows, k + 1]` logits minus the row's maximum: a log-sum-exp would be as coarse as large logits are."""
    maximum = torch.maximum(kept.amax(dim=1), tail.maximum)
    together = tail.maximum - maximum + tail.total.log()
    return torch.cat([kept - maximum[:, None], together[:, None]], dim=1)


def start_divergence_(
    student: Tensor, teacher: Tensor, shard: VocabShard, objective: Objective
) -> PendingRows | PendingRestrictedRows:
    """`start_rows_` on the teacher's `objective.top_k` best columns, if that is set; same arguments."""
    if objective.top_k is None or objective.top_k >= shard.vocabulary:
        return start_rows_(student, teacher, shard, replace(objective, top_k=None, tail=False))
    rows, k = student.shape[0], objective.top_k
    # Slots beyond a short shard's columns are never picked: -inf loses to every logit, and k real ones exist.
    packed = student.new_full((2, rows, k + 2 * objective.tail), -torch.inf)
    columns = torch.zeros(rows, k, dtype=torch.int64, device=student.device)
    held = min(k, shard.columns)
    if held > 0:
        columns[:, :held] = _best_columns(teacher, held)
        torch.gather(student, 1, columns[:, :held], out=packed[0, :, :held])
        torch.gather(teacher, 1, columns[:, :held], out=packed[1, :, :held])
    if objective.tail:
        for logits, rest in zip((student, teacher), packed[..., k:], strict=True):
            logits.scatter_(1, columns[:, :held], NO_LOGIT)
            if objective.temperature != 1:
                logits.div_(objective.temperature)
            for block in row_blocks(logits):
                rest[block, 0] = shift_(logits[block])
                rest[block, 1] = logits[block].exp_().sum(dim=1)
    return PendingRestrictedRows(student, columns, shard, objective, shard.start_gather(packed))


def _best_columns(logits: Tensor, k: int) -> Tensor:
    """Columns of the k largest logits of each row, `[rows, k]`, largest first, ties by lower index.

    If there are many columns, only those in the k segments with the largest maxima (ties by lower index) and the few
    after the last segment are ranked. All others rank after the largest of each of these segments, hence after k
    columns.
    """
    columns = logits.shape[1]
    if columns <= _WORTH_CUTTING * k * _SEGMENT:
        return torch.cat([_ranked(logits[block], k) for block in row_blocks(logits)])
    whole = columns // _SEGMENT
    cut, rest = logits[:, : whole * _SEGMENT].unflatten(1, (whole, _SEGMENT)), logits[:, whole * _SEGMENT :]
    segments = _best_columns(cut.amax(dim=2), k).sort(dim=1).values  # in order, so that their columns are
    among = cut.gather(1, segments[:, :, None].expand(-1, -1, _SEGMENT)).flatten(start_dim=1)
    place = _best_columns(torch.cat([among, rest], dim=1), k)
    column = segments.gather(1, (place // _SEGMENT).clamp(max=k - 1)) * _SEGMENT + place % _SEGMENT
    return torch.where(place < k * _SEGMENT, column, place + (whole - k) * _SEGMENT)


def _ranked(logits: Tensor, k: int) -> Tensor:
    """`_best_columns` by ranking all columns.

    `topk` breaks ties arbitrarily, and bf16 logits tie often. Columns strictly above the k-th value are correct in any
    case; the rest are the first columns that equal the k-th value, found by a second `topk` on their indices.
    """
    columns = logits.shape[1]
    values, indices = logits.topk(k, dim=1)
    threshold = values[:, -1:]
    position = torch.arange(columns, dtype=torch.int32, device=logits.device)
    tied = torch.where(logits == threshold, -position, -columns).topk(k, dim=1).values.neg().long()
    above = (~(values <= threshold)).sum(dim=1, keepdim=True)  # written so that NaN is above: it must come out as NaN
    slot = torch.arange(k, device=logits.device)
    chosen = torch.where(slot < above, indices, tied.gather(1, (slot - above).clamp(min=0)))
    chosen = chosen.sort(dim=1).values
    order = torch.sort(logits.gather(1, chosen), dim=1, descending=True, stable=True).indices
    return chosen.gather(1, order)
