"""What the losses compute over the columns of some rows, in torch operations, block by block.

Rows are worked on in blocks whose scratch stays in the cache of a CPU core (2.4 x the speed of whole chunks, measured
on a 441 x 151,936 chunk). `triton_kernels.py` has the same three functions for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_trd.losses.objective import Objective

# A logit no real one reaches, for a masked column or the maximum of a shard that has none. Finite, because it meets
# factors that are exactly 0 and 0 * inf is NaN; below float32's largest by enough to be added, doubled and scaled.
NO_LOGIT = -1e30

HOST_BLOCK_BYTES = 2 * 2**20
ACCELERATOR_BLOCK_BYTES = 64 * 2**20  # of what has no kernel of its own: fewer, longer operations


def shift_(logits: Tensor) -> Tensor:
    """Subtract each row's maximum in place and return it, `[rows]` (`NO_LOGIT` where a shard has no column)."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), NO_LOGIT)
    maximum = logits.amax(dim=1)
    logits.sub_(maximum[:, None])
    return maximum


def blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` into slices of at most a block's bytes (at least one row)."""
    budget = ACCELERATOR_BLOCK_BYTES if device.type == "cuda" else HOST_BLOCK_BYTES
    step = max(1, budget // max(1, row_bytes))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _blocks_of(student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    rows, columns = student.shape
    for rows_here in blocks(rows, columns * student.element_size(), student.device):
        yield rows_here, student[rows_here], teacher[rows_here]


def statistics_(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """This rank's `[5, rows]`: maximum and sum of the student, of the teacher, and its share of a KL (`jsd`: 0).

    Leaves in (student, teacher), shifted logits written x and y: `forward_kl` (e^x, e^y); `reverse_kl` (e^x, x - y);
    `jsd` (x, y).
    """
    if objective.temperature != 1:
        student.div_(objective.temperature)
        teacher.div_(objective.temperature)
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


def mixture_(student: Tensor, teacher: Tensor, log_s: Tensor, log_t: Tensor, objective: Objective) -> Tensor:
    """This rank's `[2, rows]` shares of KL(t || m) and KL(s || m); turns (x, y) into (s, log s - log m)."""
    log_beta = student.new_tensor(objective.beta).log()
    log_rest = student.new_tensor(1 - objective.beta).log()
    kls = student.new_zeros(2, student.shape[0])
    for rows, x, y in _blocks_of(student, teacher):
        x.add_(log_s[rows, None])
        y.add_(log_t[rows, None])
        difference = y - x
        # Both log-ratios to the mixture come from the difference of logs by their own logaddexp: one minus the
        # other would cancel where the difference is large.
        s_over_m = torch.logaddexp(difference + log_beta, log_rest).neg_()
        t_over_m = torch.logaddexp(torch.sub(log_rest, difference, out=difference), log_beta, out=difference).neg_()
        torch.sum(t_over_m.mul_(y.exp_()), dim=1, out=kls[0, rows])
        y.copy_(s_over_m)
        torch.sum(s_over_m.mul_(x.exp_()), dim=1, out=kls[1, rows])
    return kls


def gradient_(student: Tensor, teacher: Tensor, factor: Tensor, other: Tensor, objective: Objective) -> Tensor:
    """Turn what `statistics_` or `mixture_` left into the gradient of the student's logits, in their buffer.

    `factor`, `other`, `[rows]`: `forward_kl` factor e^x - other e^y; the other two factor s (log-ratio + other).
    """
    for rows, x, y in _blocks_of(student, teacher):
        if objective.divergence == "forward_kl":
            x.mul_(factor[rows, None]).addcmul_(y, other[rows, None], value=-1)
        else:
            x.mul_(y.add_(other[rows, None])).mul_(factor[rows, None])
    return student
