"""The passes over a chunk of logits on a GPU: one reads both sides for the statistics, one for the gradient.

Each program works on one row. It writes only a few numbers per row and, in the last pass, the gradient, in the dtype
that the next products take. `jsd` has another pass in between for the mixture.

Without a GPU these run in Triton's interpreter (`TRITON_INTERPRET=1`), which the tests use.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_trd.losses.kernels import Kernels
from megatron_trd.losses.objective import Objective
from megatron_trd.losses.torch_kernels import NO_LOGIT

_BLOCK = 8192  # columns of a row held in registers at once
_WARPS = 16
_NONE = tl.constexpr(NO_LOGIT)


@triton.jit
def _load(row, offsets, columns, inverse_temperature):
    logits = tl.load(row + offsets, mask=offsets < columns, other=_NONE)
    # A masked or out-of-range column gets a finite logit below any real one.
    return tl.maximum(logits * inverse_temperature, _NONE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _statistics(
    x_ptr, y_ptr, out_ptr, rows, columns, stride, inverse_temperature, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + row * stride, y_ptr + row * stride
    x_max, y_max = tl.full([], _NONE, tl.float32), tl.full([], _NONE, tl.float32)
    x_sum, y_sum, share = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = _load(x_row, offsets, columns, inverse_temperature)
        y = _load(y_row, offsets, columns, inverse_temperature)
        new_x, new_y = tl.maximum(x_max, tl.max(x, 0)), tl.maximum(y_max, tl.max(y, 0))
        x_drop, y_drop = x_max - new_x, y_max - new_y
        # Rescale the sums to the new maxima. All differences are between numbers of a row's own size: logits far from
        # zero lose no precision.
        if KIND == 0:
            share = tl.exp(y_drop) * (share + y_sum * (y_drop - x_drop))
        if KIND == 1:
            share = tl.exp(x_drop) * (share + x_sum * (x_drop - y_drop))
        x, y = x - new_x, y - new_y
        here = offsets < columns
        e_x, e_y = tl.where(here, tl.exp(x), 0.0), tl.where(here, tl.exp(y), 0.0)
        x_sum = x_sum * tl.exp(x_drop) + tl.sum(e_x, 0)
        y_sum = y_sum * tl.exp(y_drop) + tl.sum(e_y, 0)
        if KIND == 0:
            share += tl.sum(e_y * (y - x), 0)
        if KIND == 1:
            share += tl.sum(e_x * (x - y), 0)
        x_max, y_max = new_x, new_y
    tl.store(out_ptr + row, x_max)
    tl.store(out_ptr + rows + row, x_sum)
    tl.store(out_ptr + 2 * rows + row, y_max)
    tl.store(out_ptr + 3 * rows + row, y_sum)
    tl.store(out_ptr + 4 * rows + row, share)


@triton.jit
def _shifts(row, rows):
    # Two numbers per side, the maximum first: their sum would have the maximum's rounding error.
    return tl.load(row), tl.load(row + rows), tl.load(row + 2 * rows), tl.load(row + 3 * rows)


@triton.jit
def _log_add(a, b):
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _mixture(
    x_ptr,
    y_ptr,
    shifts_ptr,
    out_ptr,
    rows,
    columns,
    stride,
    inverse_temperature,
    log_beta,
    log_rest,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_max, log_s, y_max, log_t = _shifts(shifts_ptr + row, rows)
    kl_t, kl_s = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        here = offsets < columns
        x = _load(x_ptr + row * stride, offsets, columns, inverse_temperature) - x_max + log_s
        y = _load(y_ptr + row * stride, offsets, columns, inverse_temperature) - y_max + log_t
        kl_t -= tl.sum(tl.where(here, tl.exp(y) * _log_add(log_rest - (y - x), log_beta), 0.0), 0)
        kl_s -= tl.sum(tl.where(here, tl.exp(x) * _log_add(y - x + log_beta, log_rest), 0.0), 0)
    tl.store(out_ptr + row, kl_t)
    tl.store(out_ptr + rows + row, kl_s)


@triton.jit
def _gradient(
    x_ptr,
    y_ptr,
    out_ptr,
    shifts_ptr,
    factor_ptr,
    other_ptr,
    rows,
    columns,
    stride,
    out_stride,
    inverse_temperature,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    x_max, log_s, y_max, log_t = _shifts(shifts_ptr + row, rows)
    x = _load(x_ptr + row * stride, offsets, columns, inverse_temperature) - x_max + log_s
    y = _load(y_ptr + row * stride, offsets, columns, inverse_temperature) - y_max + log_t
    factor, other = tl.load(factor_ptr + row), tl.load(other_ptr + row)
    if KIND == 0:
        gradient = factor * tl.exp(x) - other * tl.exp(y)
    elif KIND == 1:
        gradient = factor * tl.exp(x) * (x - y + other)
    else:
        gradient = factor * tl.exp(x) * (other - _log_add(y - x + log_beta, log_rest))
    tl.store(out_ptr + row * out_stride + offsets, gradient.to(out_ptr.dtype.element_ty), mask=offsets < columns)


class TritonKernels(Kernels):
    """Every pass reads the original logits; the gradient may overwrite the student's."""

    def __init__(self, student: Tensor, teacher: Tensor, objective: Objective) -> None:
        super().__init__(student, teacher, objective)
        assert student.stride() == teacher.stride(), "one stride serves both"
        assert student.stride(1) == 1, "columns lie side by side"
        self._kind = ("forward_kl", "reverse_kl", "jsd").index(objective.divergence)
        self._inverse = 1.0 / objective.temperature
        self._logs = [math.log(objective.beta), math.log1p(-objective.beta)]

    def statistics(self) -> Tensor:
        rows, columns = self.student.shape
        sums = self.student.new_empty(5, rows)
        _statistics[(rows,)](
            self.student, self.teacher, sums, rows, columns, self.student.stride(0), self._inverse,
            KIND=self._kind, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        zeros = torch.zeros_like(sums[0])
        self._shifts = torch.stack([sums[0], zeros, sums[2], zeros])
        return sums

    def mixture(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        rows, columns = self.student.shape
        self._shifts[1], self._shifts[3] = log_s, log_t
        out = self.student.new_empty(2, rows)
        _mixture[(rows,)](
            self.student, self.teacher, self._shifts, out, rows, columns, self.student.stride(0), self._inverse,
            *self._logs, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        return out

    def gradient(self, factor: Tensor, other: Tensor, out: Tensor) -> None:
        rows, columns = self.student.shape
        # A block is read before it is written, and only by its own program: `out` may be the student's memory.
        _gradient[(rows, triton.cdiv(columns, _BLOCK))](
            self.student, self.teacher, out, self._shifts, factor.contiguous(), other.contiguous(), rows, columns,
            self.student.stride(0), out.stride(0), self._inverse, *self._logs, KIND=self._kind, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
