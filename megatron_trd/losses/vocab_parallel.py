"""The divergence of existing logits: each rank holds its columns of both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_trd.losses.objective import Divergence, Objective
from megatron_trd.losses.shard import VocabShard, statistics_dtype
from megatron_trd.losses.top_k import start_divergence_
from megatron_trd.losses.torch_kernels import NO_LOGIT


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    clip: float | None = None,
    top_k: int | None = None,
    tail: bool = False,
) -> Tensor:
    """Divergence of every token between two sets of vocabulary-sharded logits.

    Args:
        student_logits: `[tokens, V / p]`, this rank's columns in rank order; any floating dtype. -inf is a masked
            column. Every rank of the group holds the same number of tokens and of columns.
        teacher_logits: `[tokens, V / p]`, the same columns; never receives a gradient.
        group: the tensor-parallel group of size p; None: the vocabulary is not sharded. All its ranks must call.
        divergence: `forward_kl` = KL(teacher || student), `reverse_kl` = KL(student || teacher), or `jsd` =
            beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student. By this
            definition `jsd` goes to zero as beta goes to 0 or 1.
        beta: the teacher's weight in `jsd`, from 0.001 to 0.999.
        temperature: divides the logits of both sides; the result is not multiplied by its square.
        vocab_size: the true vocabulary; columns of global index >= vocab_size have probability 0 on both sides.
        clip: D_t becomes min(D_t, clip), with no gradient where D_t is larger.
        top_k: restrict the divergence to the teacher's top_k tokens of the whole vocabulary, both sides renormalised on
            them; ties go to the lower index.
        tail: with `top_k`, do not renormalise: all other tokens together count as one more outcome.

    Returns:
        `[tokens]`, float32 (float64 if an input is), the same on every rank. Its gradient reaches
        `student_logits` exactly and without a further collective, provided the upstream gradient is the same on
        every rank, as it is when the loss is.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "logits must both be [tokens, vocabulary / ranks], not "
            f"{list(student_logits.shape)} (student) and {list(teacher_logits.shape)} (teacher)"
        )
    objective = Objective(divergence, beta, temperature, clip, top_k, tail)
    shard = VocabShard.of(group, student_logits.shape[1], vocab_size)
    gradient = torch.is_grad_enabled() and student_logits.requires_grad
    apply: Callable[..., Tensor] = _VocabParallelDivergence.apply
    return apply(student_logits, teacher_logits.detach(), shard, objective, gradient)


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        shard: VocabShard,
        objective: Objective,
        gradient: bool,
    ) -> Tensor:
        dtype = statistics_dtype(student_logits, teacher_logits)
        student, teacher = (
            # contiguous rows, whatever the caller's logits are a view of
            logits[:, : shard.columns].to(dtype, copy=True, memory_format=torch.contiguous_format).clamp_(min=NO_LOGIT)
            for logits in (student_logits, teacher_logits)
        )
        ctx.dtype, ctx.padding = student_logits.dtype, student_logits.shape[1] - shard.columns
        if student.shape[0] == 0:  # token counts agree in the group: every rank skips the collectives
            ctx.save_for_backward(student)
            return student.new_zeros(0)
        ones = student.new_ones(student.shape[0])
        rows = start_divergence_(student, teacher, shard, objective)
        result = rows.finish(ones, student if gradient else None)
        if gradient:
            ctx.save_for_backward(student)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = (gradient * upstream[:, None]).to(ctx.dtype)
        return torch.nn.functional.pad(scaled, (0, ctx.padding)), None, None, None, None
