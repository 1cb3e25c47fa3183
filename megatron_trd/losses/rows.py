"""The divergence and its gradient for some rows of logits, in the buffers that hold them.

Everything the losses compute over the vocabulary is here, derived by hand in docs/method.md. With x and y the student's
and the teacher's logits over the temperature, s and t their softmaxes:

    forward_kl   D = sum t (log t - log s)                       dD/dx = s - t
    reverse_kl   D = sum s (log s - log t)                       dD/dx = s (log s - log t - D)
    jsd          D = b KL(t || m) + (1 - b) KL(s || m)           dD/dx = (1 - b) s (log s - log m - KL(s || m))
                 m = b t + (1 - b) s

A rank sees its columns only. It shifts them by its own maximum, sums, and sends (maximum, sum) of both sides and, for
the two KLs, its share of D in ONE all-gather; every rank then combines the shares to the same bits. Only `jsd`, whose
mixture needs both normalisers first, has a second collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_trd.losses.objective import Objective
from megatron_trd.losses.shard import VocabShard

# A logit no real one reaches, for a masked column or the maximum of a shard that has none. Finite, because it meets
# factors that are exactly 0 and 0 * inf is NaN; below float32's largest by enough to be added, doubled and scaled.
NO_LOGIT = -1e30

# Rows are worked on in blocks whose scratch stays in the cache of a CPU core (2.4 x the speed of whole chunks, measured
# on a 441 x 151,936 chunk); an accelerator wants fewer, longer kernels.
HOST_BLOCK_BYTES = 2 * 2**20
ACCELERATOR_BLOCK_BYTES = 64 * 2**20


class _Sums(NamedTuple):
    """What is known of each row once the ranks have spoken; all `[rows]`."""

    log_s: Tensor  # add to this rank's shifted student logits: log-probabilities
    log_t: Tensor
    divergence: Tensor | None  # of the two KLs


def divergence_rows_(
    student: Tensor,
    teacher: Tensor,
    scale: Tensor,
    shard: VocabShard,
    objective: Objective,
    *,
    gradient: bool,
) -> Tensor:
    """Divergence of each row; **overwrites** both logits.

    Args:
        student: `[rows, shard.columns]` logits, float32 or float64, rows > 0. Afterwards `scale * dD/dlogits` if
            `gradient`, else rubbish.
        teacher: likewise. Afterwards rubbish.
        scale: `[rows]`, factor of each row's gradient.
        shard: the columns held here; its group takes part in one all-gather (`jsd`: and one all-reduce).
        objective: what to compute on all of these columns. `top_k` is the business of `top_k.py`.
        gradient: whether to leave the gradient in `student`.

    Returns:
        `[rows]`, the same bits on every rank, after `objective.clip`.
    """
    if objective.temperature != 1:
        student.div_(objective.temperature)
        teacher.div_(objective.temperature)
    sums = _combine(shard.gather(_local_sums_(student, teacher, objective)), shard.rank, objective)
    if sums.divergence is None:
        divergence, expectation = _mixture_(student, teacher, sums, shard, objective.beta)
    else:
        divergence = expectation = sums.divergence
    if objective.clip is not None:
        scale = torch.where(divergence <= objective.clip, scale, 0)
    if gradient:
        _gradient_(student, teacher, sums, expectation, scale / objective.temperature, objective)
    # Rounding leaves some -1e-8 where the truth is 0: a divergence is never negative.
    return divergence.clamp(min=0, max=objective.clip)


def shift_(logits: Tensor) -> Tensor:
    """Subtract each row's maximum in place and return it, `[rows]` (`NO_LOGIT` where a shard has no column)."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), NO_LOGIT)
    maximum = logits.amax(dim=1)
    logits.sub_(maximum[:, None])
    return maximum


def log_scales(maximum: Tensor, total: Tensor) -> Tensor:
    """What makes each rank's shifted logits log-probabilities when added, `[ranks, rows]`.

    `maximum` and `total`, `[ranks, rows]`, are each rank's maximum and sum of shifted exponentials. Only differences of
    maxima enter: log sum exp itself is as large as the logits, and so would be its rounding error.
    """
    below = maximum - maximum.amax(dim=0)
    return below - (total * below.exp()).sum(dim=0).log()


def blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` into slices of at most a block's bytes (at least one row)."""
    budget = ACCELERATOR_BLOCK_BYTES if device.type == "cuda" else HOST_BLOCK_BYTES
    step = max(1, budget // max(1, row_bytes))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _blocks_of(student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    rows, columns = student.shape
    for rows_here in blocks(rows, columns * student.element_size(), student.device):
        yield rows_here, student[rows_here], teacher[rows_here]


def _local_sums_(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """This rank's `[5, rows]`: maximum and sum of the student, of the teacher, and its share of a KL (`jsd`: 0).

    Leaves in (student, teacher), shifted logits written x and y: `forward_kl` (e^x, e^y); `reverse_kl` (e^x, x - y);
    `jsd` (x, y).
    """
    sums = student.new_zeros(5, student.shape[0])
    for rows, x, y in _blocks_of(student, teacher):
        x_max, x_sum, y_max, y_sum, share = sums[:, rows].unbind()
        x_max.copy_(shift_(x))
        y_max.copy_(shift_(y))
        if objective.divergence == "forward_kl":
            difference = y - x
            torch.sum(x.exp_(), dim=1, out=x_sum)
            torch.sum(y.exp_(), dim=1, out=y_sum)
            torch.sum(difference.mul_(y), dim=1, out=share)
        elif objective.divergence == "reverse_kl":
            scratch = y.exp()
            torch.sum(scratch, dim=1, out=y_sum)
            torch.sub(x, y, out=y)
            torch.sum(x.exp_(), dim=1, out=x_sum)
            torch.sum(torch.mul(x, y, out=scratch), dim=1, out=share)
        else:
            scratch = x.exp()
            torch.sum(scratch, dim=1, out=x_sum)
            torch.sum(torch.exp(y, out=scratch), dim=1, out=y_sum)
    return sums


def _combine(gathered: Tensor, rank: int, objective: Objective) -> _Sums:
    """Every rank's `[ranks, 5, rows]` to the sums of whole rows."""
    x_max, x_sum, y_max, y_sum, share = gathered.unbind(dim=1)
    log_s, log_t = log_scales(x_max, x_sum), log_scales(y_max, y_sum)  # [ranks, rows]
    if objective.divergence == "forward_kl":
        divergence = (log_t.exp() * (share + y_sum * (log_t - log_s))).sum(dim=0)
    elif objective.divergence == "reverse_kl":
        divergence = (log_s.exp() * (share + x_sum * (log_s - log_t))).sum(dim=0)
    else:
        divergence = None
    return _Sums(log_s[rank], log_t[rank], divergence)


def _mixture_(student: Tensor, teacher: Tensor, sums: _Sums, shard: VocabShard, beta: float) -> tuple[Tensor, Tensor]:
    """(jsd, KL(s || m)), `[rows]` each; turns the shifted logits into (s, log s - log m)."""
    log_beta = student.new_tensor(beta).log()
    log_rest = student.new_tensor(1 - beta).log()
    kls = student.new_zeros(2, student.shape[0])
    for rows, x, y in _blocks_of(student, teacher):
        x.add_(sums.log_s[rows, None])
        y.add_(sums.log_t[rows, None])
        difference = y - x
        # Both log-ratios to the mixture come from the difference of logs by their own logaddexp: one minus the
        # other would cancel where the difference is large.
        s_over_m = torch.logaddexp(difference + log_beta, log_rest).neg_()
        t_over_m = torch.logaddexp(torch.sub(log_rest, difference, out=difference), log_beta, out=difference).neg_()
        torch.sum(t_over_m.mul_(y.exp_()), dim=1, out=kls[0, rows])
        y.copy_(s_over_m)
        torch.sum(s_over_m.mul_(x.exp_()), dim=1, out=kls[1, rows])
    kl_t, kl_s = shard.sum_(kls)
    return beta * kl_t + (1 - beta) * kl_s, kl_s


def _gradient_(
    student: Tensor, teacher: Tensor, sums: _Sums, expectation: Tensor, scale: Tensor, objective: Objective
) -> None:
    """Turn what `_local_sums_` or `_mixture_` left into `scale * dD/dx`, in `student`."""
    if objective.divergence == "forward_kl":
        of_student, of_teacher = scale * sums.log_s.exp(), scale * sums.log_t.exp()
        for rows, x, y in _blocks_of(student, teacher):
            x.mul_(of_student[rows, None]).addcmul_(y, of_teacher[rows, None], value=-1)
        return
    # The other two are factor * s * (log-ratio - its expectation under s).
    if objective.divergence == "reverse_kl":
        factor, offset = scale * sums.log_s.exp(), sums.log_s - sums.log_t - expectation
    else:
        factor, offset = scale * (1 - objective.beta), -expectation
    for rows, x, y in _blocks_of(student, teacher):
        x.mul_(y.add_(offset[rows, None])).mul_(factor[rows, None])
