"""Hidden states in, loss out: the two output heads and the divergence, a chunk of tokens at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_trd.losses.head import add_product, chunks, chunks_under_way, product_into, waiting_tokens
from megatron_trd.losses.objective import Divergence, Objective
from megatron_trd.losses.rows import PendingRows
from megatron_trd.losses.shard import VocabShard, statistics_dtype
from megatron_trd.losses.top_k import PendingRestrictedRows, start_divergence_


class FusedDivergence(NamedTuple):
    """The weighted sum, used for training, and its unweighted terms, used for reporting."""

    loss: Tensor  # scalar
    per_token: Tensor  # [tokens], detached, not weighted


class _Side(NamedTuple):
    hidden: Tensor  # [tokens, hidden]
    weight: Tensor  # [V / p, hidden]


class _Result(NamedTuple):
    per_token: Tensor
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    clip: float | None = None,
    top_k: int | None = None,
    tail: bool = False,
    accumulate: bool = False,
) -> FusedDivergence:
    """`sum_t token_weights[t] * D_t` from hidden states, without ever holding the logits of more than a chunk.

    The gradients are computed in the forward pass, chunk by chunk; backward only scales them. That work is skipped with
    gradients disabled and for inputs that do not require one.

    Args:
        student_hidden: `[tokens, hidden]`, the input of the student's output head; the same on every rank of `group`.
            **Its gradient is complete on every rank: it is summed over `group` here, not by the caller** (do not also
            feed this through Megatron's `copy_to_tensor_model_parallel_region`).
        student_weight: `[V / p, hidden]`, this rank's rows of the output head, in rank order, dtype of
            `student_hidden`. Its gradient is this shard's: accumulated in float32, then added to the `main_grad` of
            a parameter under Megatron's DDP, or returned in the parameter's dtype through autograd.
        teacher_hidden: `[tokens, teacher's hidden]`; never receives a gradient.
        teacher_weight: `[V / p, teacher's hidden]`, sharded as the student's; never receives a gradient.
        token_weights: `[tokens]`, any sign; 0 excludes a token.
        chunk_tokens: tokens whose logits exist at once (in two halves with several ranks); None: 320 MiB of float32
            logits per side, 640 MiB on a GPU. Twice that is allocated (three times on a GPU with 16-bit weights, for
            gradients that wait for their products), plus about 50 MiB of scratch; `top_k` takes another k KiB per token
            of a chunk. The result does not depend on it beyond rounding. In backward the chunks are already freed, and
            float32 gradients are scaled in place unless the graph is retained.
        accumulate: add the head's gradient to its `main_grad`, if it has one of the loss's dtype, in forward instead of
            backward, which saves a float32 copy of the head. Only for callers that call backward once and directly on
            this loss, as Megatron's schedules do: an upstream gradient other than 1 raises `RuntimeError` in backward.
        group, divergence, beta, temperature, vocab_size, clip, top_k, tail: as in `vocab_parallel_divergence`.

    Returns:
        loss and per-token divergences, float32 (float64 if an input is), bitwise equal on every rank of `group`. All
        its ranks must call with the same number of tokens. Zero tokens give 0 and zero gradients.
    """
    _check_shapes(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weights)
    objective = Objective(divergence, beta, temperature, clip, top_k, tail)
    shard = VocabShard.of(group, student_weight.shape[0], vocab_size)
    inputs = [student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), token_weights]
    if not torch.is_grad_enabled():  # a Function knows which inputs require gradients, not whether they are on
        inputs = [tensor.detach() for tensor in inputs]
    apply: Callable[..., tuple[Tensor, Tensor]] = _FusedLinearDivergence.apply
    return FusedDivergence(*apply(*inputs, shard, objective, chunk_tokens, accumulate))


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor,
        shard: VocabShard,
        objective: Objective,
        chunk_tokens: int | None,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        scale = token_weights.to(statistics_dtype(student_hidden, teacher_hidden))
        student, teacher = _Side(student_hidden, student_weight), _Side(teacher_hidden, teacher_weight)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        main = getattr(student_weight, "main_grad", None) if accumulate and needs_weight else None
        into = main if main is not None and main.dtype == scale.dtype else None
        result = _over_chunks(student, teacher, scale, shard, objective, chunk_tokens, needs_hidden, needs_weight, into)
        # Saved, not kept as attributes: autograd frees them after backward even while the loss is referenced.
        ctx.save_for_backward(result.hidden_gradient, result.weight_gradient, result.per_token)
        ctx.dtypes = student_hidden.dtype, token_weights.dtype
        ctx.weight = student_weight
        ctx.mark_non_differentiable(result.per_token)
        return (result.per_token * scale).sum(), result.per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_weights = (ctx.needs_input_grad[place] for place in (0, 1, 4))
        hidden, weight, per_token = ctx.saved_tensors
        # Scaled directly into the target dtype, without a second float32 copy of the head's gradient.
        return (
            _scaled(hidden, upstream, ctx.dtypes[0]) if needs_hidden else None,
            _weight_gradient(ctx.weight, weight, upstream) if needs_weight else None,
            None,
            None,
            (per_token * upstream).to(ctx.dtypes[1]) if needs_weights else None,  # also an output: not in place
            None,
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * upstream` in `dtype`: in place if the gradient has that dtype and no later backward needs it."""
    # torch's compiled functions decide in the same way whether saved tensors may be reused (`donated_buffer`).
    if gradient.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient.mul_(upstream)
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


def _weight_gradient(weight: Any, gradient: Tensor | None, upstream: Tensor) -> Tensor:
    """The head's gradient for autograd. For a parameter under Megatron's DDP it goes to `main_grad`, unless it is
    already there (`gradient` is None), and autograd gets a placeholder so that its hooks run (megatron-core
    `LinearWithGradAccumulationAndAsyncCommunication`)."""
    if gradient is None:  # upstream is checked on its device: the host does not wait for a GPU
        torch._assert_async(upstream == 1, "accumulate=True is for a loss that is back-propagated as it is")
    elif not hasattr(weight, "grad_added_to_main_grad"):
        return _scaled(gradient, upstream, weight.dtype)
    elif weight.main_grad.dtype == gradient.dtype:
        weight.main_grad.addcmul_(gradient, upstream)
    else:
        weight.main_grad.add_(_scaled(gradient, upstream, gradient.dtype))
    weight.grad_added_to_main_grad = True
    # A tied head's placeholder is added to the embedding's gradient and must not change it.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


class _GradientProducts:
    """Multiplies gradients of the logits into those of the hidden states and the head, float32, where required.

    On a GPU the gradients of several chunks are collected, in the dtype that the products take, and multiplied
    together.
    """

    def __init__(
        self, side: _Side, shard: VocabShard, hidden: Tensor | None, weight: Tensor | None, *, fresh: bool, room: int
    ) -> None:
        """`fresh`: the first product overwrites `weight` instead of being added to it. `room`: tokens whose gradients
        can be collected; 0: each chunk's are multiplied where they are."""
        self._side, self._shard, self._hidden, self._weight, self._fresh = side, shard, hidden, weight, fresh
        self._head = side.weight[: shard.columns]
        self._wanted = hidden is not None or weight is not None
        self._waiting = self._head.new_empty(room, shard.columns) if room > 0 and self._wanted else None
        self._done = 0  # tokens whose products are done; the waiting ones follow
        self._sums: list[dist.Work] = []

    def place(self, here: slice, logits: Tensor) -> Tensor | None:
        """Where to write the gradient of a chunk's logits, possibly their own memory; None: it is not needed."""
        if not self._wanted:
            return None
        return logits if self._waiting is None else self._waiting[here.start - self._done : here.stop - self._done]

    def add(self, here: slice, gradient: Tensor) -> None:
        """Accept the gradient now in `place`; multiply all waiting ones unless another such chunk follows and fits."""
        tokens, ready = len(self._side.hidden), slice(self._done, here.stop)
        if self._waiting is not None:
            room = len(self._waiting) - (ready.stop - ready.start)
            if here.stop < tokens and room >= min(here.stop - here.start, tokens - here.stop):
                return
            gradient = self._waiting[: ready.stop - ready.start]
        if self._hidden is not None:
            product_into(self._hidden[ready], gradient, self._head)
            self._sums.extend(self._shard.start_sum_(self._hidden[ready]))  # overlaps with the products that follow
        if self._weight is not None:
            first = self._fresh and ready.start == 0
            add_product(self._weight[: self._shard.columns], gradient.t(), self._side.hidden[ready], first=first)
        self._done = here.stop

    def wait(self) -> None:
        """Wait for the sums over ranks."""
        for work in self._sums:
            work.wait()


def _over_chunks(
    student: _Side,
    teacher: _Side,
    scale: Tensor,
    shard: VocabShard,
    objective: Objective,
    chunk_tokens: int | None,
    needs_hidden: bool,
    needs_weight: bool,
    into: Tensor | None,
) -> _Result:
    """For every chunk: two head products, the divergence, its gradient and the gradients' products. If `into` is given,
    the weight's gradient is added to it and not returned.

    With several ranks two chunks are in flight: while the sums of one are exchanged, the previous one is finished.
    """
    tokens, width = student.hidden.shape[0], student.weight.shape[0]
    per_token = torch.empty_like(scale)
    hidden_gradient = scale.new_empty(student.hidden.shape) if needs_hidden else None
    weight_gradient = into
    if into is None and needs_weight:
        weight_gradient = scale.new_empty(student.weight.shape)
        weight_gradient[shard.columns if tokens else 0 :].zero_()  # the first chunk writes the rest
    depth = chunks_under_way(shard.size)
    slices = chunks(tokens, width, chunk_tokens, scale.dtype, scale.device, under_way=depth)
    rows = slices[0].stop if slices else 0
    # All chunks reuse the same buffers: on a CPU, page faults of new ones cost more than the softmaxes.
    buffers = scale.new_empty(min(depth, len(slices)), 2, rows, shard.columns)
    room = waiting_tokens(tokens, rows, student.weight.dtype, scale.dtype, scale.device, under_way=depth)
    products = _GradientProducts(student, shard, hidden_gradient, weight_gradient, fresh=into is None, room=room)

    def finish(here: slice, logits: Tensor, pending: PendingRows | PendingRestrictedRows) -> None:
        gradient = products.place(here, logits)
        per_token[here] = pending.finish(scale[here], gradient)
        if gradient is not None:
            products.add(here, gradient)

    under_way: deque[tuple[slice, Tensor, PendingRows | PendingRestrictedRows]] = deque()
    for number, here in enumerate(slices):
        x, y = buffers[number % depth, :, : here.stop - here.start]
        product_into(x, student.hidden[here], student.weight[: shard.columns].t())
        product_into(y, teacher.hidden[here], teacher.weight[: shard.columns].t())
        under_way.append((here, x, start_divergence_(x, y, shard, objective)))
        if len(under_way) == depth:
            finish(*under_way.popleft())
    while under_way:
        finish(*under_way.popleft())
    products.wait()
    return _Result(per_token, hidden_gradient, weight_gradient if into is None else None)


def _check_shapes(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
) -> None:
    tokens = student_hidden.shape[0]
    fits = (
        all(tensor.dim() == 2 for tensor in (student_hidden, student_weight, teacher_hidden, teacher_weight))
        and student_hidden.shape[1] == student_weight.shape[1]
        and teacher_hidden.shape[1] == teacher_weight.shape[1]
        and student_weight.shape[0] == teacher_weight.shape[0]
        and teacher_hidden.shape[0] == tokens
        and token_weights.shape == (tokens,)
    )
    if not fits:
        raise ValueError(
            "expected hidden [tokens, hidden] and weight [vocabulary / ranks, hidden] of each side and token_weights "
            f"[tokens], not student {list(student_hidden.shape)} and {list(student_weight.shape)}, teacher "
            f"{list(teacher_hidden.shape)} and {list(teacher_weight.shape)}, token_weights {list(token_weights.shape)}"
        )
