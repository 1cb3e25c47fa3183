"""The divergence and its gradient for some rows of logits, in the buffers that hold them.

What the ranks exchange and what is computed from it; the passes over a rank's columns are in `kernels.py`. See
docs/method.md for the derivation. With x and y the student's and the teacher's logits over the temperature, s and t
their softmaxes:

    forward_kl   D = sum t (log t - log s)                       dD/dx = s - t
    reverse_kl   D = sum s (log s - log t)                       dD/dx = s (log s - log t - D)
    jsd          D = b KL(t || m) + (1 - b) KL(s || m)           dD/dx = (1 - b) s (log s - log m - KL(s || m))
                 m = b t + (1 - b) s

A rank sees only its own columns. It shifts them by its own maximum, sums, and sends (maximum, sum) of both sides and,
for the two KLs, its share of D in ONE all-gather; every rank then combines the shares into bitwise equal results. Only
`jsd`, whose mixture needs both normalisers first, has a second collective.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_trd.losses.kernels import Kernels, kernels_for
from megatron_trd.losses.objective import Objective
from megatron_trd.losses.shard import Gathering, VocabShard


class _Sums(NamedTuple):
    """What is known of each row after the exchange between ranks; all `[rows]`."""

    log_s: Tensor  # added to this rank's shifted student logits, gives log-probabilities
    log_t: Tensor
    divergence: Tensor | None  # of the two KLs


class PendingRows(NamedTuple):
    """Rows whose sums are being exchanged between the ranks."""

    kernels: Kernels
    shard: VocabShard
    objective: Objective
    sums: Gathering

    def finish(self, scale: Tensor, out: Tensor | None) -> Tensor:
        """The divergence of each row after `objective.clip`, `[rows]`, bitwise equal on every rank.

        `scale * dD/dlogits` of the student goes into `out`, `[rows, columns]`, if it is given: a tensor of any
        floating dtype, or the student's logits themselves. `scale`, `[rows]`, is the factor of each row.
        """
        objective = self.objective
        sums = _combine(self.sums.wait(), self.shard.rank, objective)
        if sums.divergence is None:
            kl_t, kl_s = self.shard.sum_(self.kernels.mixture(sums.log_s, sums.log_t))
            divergence, expectation = objective.beta * kl_t + (1 - objective.beta) * kl_s, kl_s
        else:
            divergence = expectation = sums.divergence
        if out is not None:
            kept = scale if objective.clip is None else torch.where(divergence <= objective.clip, scale, 0)
            terms = _gradient_terms(sums, expectation, kept / objective.temperature, objective)
            self.kernels.gradient(*terms, out)
        # Rounding can leave about -1e-8 where the exact value is 0: a divergence is never negative.
        return divergence.clamp(min=0, max=objective.clip)


def start_rows_(student: Tensor, teacher: Tensor, shard: VocabShard, objective: Objective) -> PendingRows:
    """Start the divergence of each row; **overwrites** both logits.

    Args:
        student: `[rows, shard.columns]` logits, float32 or float64, rows > 0.
        teacher: likewise.
        shard: the columns held here; its group takes part in one all-gather, which this starts (`jsd`: also in one
            all-reduce, in `finish`).
        objective: what to compute on all of these columns. `top_k` is handled in `top_k.py`.
    """
    kernels = kernels_for(student, teacher, objective)
    return PendingRows(kernels, shard, objective, shard.start_gather(kernels.statistics()))


def log_scales(maximum: Tensor, total: Tensor) -> Tensor:
    """Offsets `[ranks, rows]` that, added to each rank's shifted logits, give log-probabilities.

    `maximum` and `total`, `[ranks, rows]`, are each rank's maximum and sum of shifted exponentials. Only differences of
    maxima are used: log-sum-exp itself is as large as the logits, and so would be its rounding error.
    """
    below = maximum - maximum.amax(dim=0)
    return below - (total * below.exp()).sum(dim=0).log()


def _combine(gathered: Tensor, rank: int, objective: Objective) -> _Sums:
    """Combine all ranks' `[ranks, 5, rows]` into the sums of whole rows."""
    x_max, x_sum, y_max, y_sum, share = gathered.unbind(dim=1)
    log_s, log_t = log_scales(x_max, x_sum), log_scales(y_max, y_sum)  # [ranks, rows]
    if objective.divergence == "forward_kl":
        divergence = (log_t.exp() * (share + y_sum * (log_t - log_s))).sum(dim=0)
    elif objective.divergence == "reverse_kl":
        divergence = (log_s.exp() * (share + x_sum * (log_s - log_t))).sum(dim=0)
    else:
        divergence = None
    return _Sums(log_s[rank], log_t[rank], divergence)


def _gradient_terms(sums: _Sums, expectation: Tensor, scale: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(factor, other) of `Kernels.gradient`, `[rows]` each."""
    if objective.divergence == "forward_kl":
        return scale * sums.log_s.exp(), scale * sums.log_t.exp()
    # The other two are factor * s * (log-ratio - its expectation under s).
    if objective.divergence == "reverse_kl":
        return scale * sums.log_s.exp(), sums.log_s - sums.log_t - expectation
    return scale * (1 - objective.beta), -expectation
