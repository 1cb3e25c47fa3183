"""The passes over the columns of a chunk of rows in torch operations, block by block.

Rows are worked on in blocks whose scratch stays in the cache of a CPU core (2.4 x the speed of whole chunks, measured
on a 441 x 151,936 chunk). `triton_kernels.py` has the same three passes for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_trd.losses.kernels import Kernels

# A logit below any real one, for a masked column or the maximum of a shard without columns. Finite, because it meets
# factors that are exactly 0 and 0 * inf is NaN; small enough for float32 to be added, doubled and scaled.
NO_LOGIT = -1e30

HOST_BLOCK_BYTES = 2 * 2**20
ACCELERATOR_BLOCK_BYTES = 64 * 2**20  # where there is no dedicated kernel: fewer, longer operations


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


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """`blocks` of the rows of `logits`, `[rows, columns]`."""
    return blocks(logits.shape[0], logits.shape[1] * logits.element_size(), logits.device)


def _blocks_of(student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for rows in row_blocks(student):
        yield rows, student[rows], teacher[rows]


class TorchKernels(Kernels):
    """Works in place: each pass leaves in the logits what the next one needs."""

    def statistics(self) -> Tensor:
        # Leaves in (student, teacher): `forward_kl` (e^x, e^y); `reverse_kl` (e^x, x - y); `jsd` (x, y).
        if self.objective.temperature != 1:
            self.student.div_(self.objective.temperature)
            self.teacher.div_(self.objective.temperature)
        sums = self.student.new_zeros(5, self.student.shape[0])
        for rows, x, y in _blocks_of(self.student, self.teacher):
            x_max, x_sum, y_max, y_sum, share = sums[:, rows].unbind()
            x_max.copy_(shift_(x))
            y_max.copy_(shift_(y))
            if self.objective.divergence == "forward_kl":
                difference = y - x
                torch.sum(x.exp_(), dim=1, out=x_sum)
                torch.sum(y.exp_(), dim=1, out=y_sum)
                torch.sum(difference.mul_(y), dim=1, out=share)
            elif self.objective.divergence == "reverse_kl":
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

    def mixture(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        # Turns (x, y) into (s, log s - log m).
        beta = self.objective.beta
        weights = self.student.new_tensor([1 - beta, beta])
        kls = self.student.new_zeros(2, self.student.shape[0])
        for rows, x, y in _blocks_of(self.student, self.teacher):
            x.add_(log_s[rows, None])
            y.add_(log_t[rows, None])
            difference = y - x
            # With d = log t - log s, the larger side's log-ratio to the mixture is -log(1 + c (e^-|d| - 1)), c the
            # weight of the smaller one, and the smaller side's is |d| less. Nothing cancels for any d.
            larger = difference.abs().neg_().expm1_()
            larger.mul_(
                weights[0] if beta == 0.5 else torch.where(difference >= 0, weights[0], weights[1])
            ).log1p_().neg_()
            t_over_m = y.exp_().mul_(torch.clamp(difference, max=0).add_(larger))
            torch.sum(t_over_m, dim=1, out=kls[0, rows])
            torch.sub(larger, difference.clamp_(min=0), out=y)
            torch.sum(torch.mul(x.exp_(), y, out=larger), dim=1, out=kls[1, rows])
        return kls

    def gradient(self, factor: Tensor, other: Tensor, out: Tensor) -> None:
        for rows, x, y in _blocks_of(self.student, self.teacher):
            if self.objective.divergence == "forward_kl":
                x.mul_(factor[rows, None]).addcmul_(y, other[rows, None], value=-1)
            else:
                x.mul_(y.add_(other[rows, None])).mul_(factor[rows, None])
        if out is not self.student:
            out.copy_(self.student)
