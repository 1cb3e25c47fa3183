"""What the losses must give: cases, their inputs, and the divergences written out from their definitions in float64.

Shares no code with `megatron_trd.losses`, its `dense_divergence` included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of a loss: the objective, the sizes, and what is unusual about the inputs."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: float | None = None
    top_k: int | None = None
    tail: bool = False
    tokens: int = 6
    vocabulary: int = 24
    width: int | None = None  # columns of a shard; None: the fewest that hold the vocabulary
    hidden: int = 8
    teacher_hidden: int = 12
    chunk_tokens: int | None = None
    spread: float = 2.0  # logits are of about this size
    offset: float = 0.0  # added to every logit of a row, where logits are given
    weights: str = "mixed"  # or "zero" or "signed"
    masked: str = ""  # the side or "both" whose columns are -inf here and there, where logits are given
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def columns(self, ranks: int) -> int:
        """Columns each of `ranks` holds, padding included."""
        return self.width or math.ceil(self.vocabulary / ranks)

    def objective(self) -> dict[str, Any]:
        """Keyword arguments that say what is measured."""
        names = ("divergence", "beta", "temperature", "clip", "top_k", "tail")
        return {name: getattr(self, name) for name in names}


class Heads(NamedTuple):
    """Inputs of the fused loss, whole vocabulary."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_weights: Tensor


class Logits(NamedTuple):
    """Inputs of the loss on logits, whole vocabulary, and what its result is differentiated with."""

    student: Tensor
    teacher: Tensor
    upstream: Tensor


class Outcome(NamedTuple):
    """What a loss gave; the gradients by the name of the input."""

    per_token: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def heads(case: Case) -> Heads:
    """Small integers times a power of two: float32 products of these are exact, so only the loss's own errors remain.

    They also tie often, in the same places for every dtype and sharding.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(case.dtype)

    def scale(hidden: int) -> float:  # an integer here has a variance of 20/3
        return 2.0 ** round(math.log2(case.spread / (20 / 3 * math.sqrt(hidden))))

    return Heads(
        integers(case.tokens, case.hidden),
        integers(case.vocabulary, case.hidden) * scale(case.hidden),
        integers(case.tokens, case.teacher_hidden),
        integers(case.vocabulary, case.teacher_hidden) * scale(case.teacher_hidden),
        _token_weights(case, generator),
    )


def logits(case: Case) -> Logits:
    """Multiples of 1/16 of the spread, exact in float32 at any offset used here."""
    generator = torch.Generator().manual_seed(case.seed)
    sides = []
    for _ in range(2):
        steps = torch.randint(-32, 33, (case.tokens, case.vocabulary), generator=generator)
        sides.append((steps / 16 * case.spread + case.offset).to(case.dtype))
    masks = torch.rand(case.tokens, case.vocabulary, generator=generator) < 0.3
    masks[:, -1] = False  # some column is left
    if case.tokens > 1:
        masks[0, : case.vocabulary // 2] = True  # whole shards
    for name, side in zip(("student", "teacher"), sides, strict=True):
        if case.masked in (name, "both"):
            side.masked_fill_(masks, -torch.inf)
    return Logits(sides[0], sides[1], _token_weights(case, generator))


def _token_weights(case: Case, generator: torch.Generator) -> Tensor:
    weights = torch.rand(case.tokens, generator=generator).to(case.dtype)
    if case.weights == "zero":
        return weights.zero_()
    if case.weights == "signed":
        return weights - 0.5
    weights[2::3] = 0
    return weights


def shard(whole: Tensor, rank: int, ranks: int, width: int, dim: int = 0) -> Tensor:
    """A rank's slice of the vocabulary along `dim`, its padding full of what must not be read."""
    padding = [width * ranks - whole.shape[dim], *whole.shape[1 - dim :][:1]]
    garbage = torch.tensor([math.nan, 1e30, -1e30, math.inf, 3.0], dtype=torch.float64).to(whole.dtype)
    filling = garbage[torch.arange(math.prod(padding)) % len(garbage)].view(padding).to(whole.device)
    padded = torch.cat([whole, filling if dim == 0 else filling.t().reshape(whole.shape[0], padding[0])], dim=dim)
    return padded.narrow(dim, rank * width, width).clone()


def divergence(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
    """`[tokens]` in float64 from whole logits, by the definitions alone."""
    student, teacher = student.double() / case.temperature, teacher.detach().double() / case.temperature
    log_s, log_t = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    if case.top_k is not None and case.top_k < case.vocabulary and len(teacher) > 0:
        order = torch.tensor(
            [[column for _, column in sorted((-y, column) for column, y in enumerate(row))] for row in teacher.tolist()]
        )
        log_s, log_t = (_on_kept(log_p.gather(1, order), case.top_k, case.tail) for log_p in (log_s, log_t))
    s, t = log_s.exp(), log_t.exp()
    if case.divergence == "forward_kl":
        result = _kl(t, log_t, log_s)
    elif case.divergence == "reverse_kl":
        result = _kl(s, log_s, log_t)
    else:
        m = case.beta * t + (1 - case.beta) * s
        log_m = torch.where(m > 0, m, 1).log()
        parts = [(case.beta, t, log_t), (1 - case.beta, s, log_s)]
        result = torch.stack([weight * _kl(p, log_p, log_m) for weight, p, log_p in parts if weight > 0]).sum(dim=0)
    return result if case.clip is None else torch.where(result <= case.clip, result, case.clip)


def _on_kept(ordered: Tensor, k: int, tail: bool) -> Tensor:
    """Log-probabilities of the first k columns, renormalised; or these and that of all the others together."""
    kept, rest = ordered[:, :k], ordered[:, k:]
    return torch.cat([kept, rest.logsumexp(1, keepdim=True)], dim=1) if tail else kept.log_softmax(dim=1)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p log(p / q), where 0 log 0 is 0 and so is its gradient."""
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(dim=1)


def products(inputs: Heads) -> tuple[Tensor, Tensor]:
    """Whole logits of the student and the teacher."""
    student = inputs.student_hidden @ inputs.student_weight.t()
    return student, inputs.teacher_hidden @ inputs.teacher_weight.t()


def fused(case: Case) -> Outcome:
    """What `fused_linear_divergence` must give over the whole vocabulary."""
    inputs = Heads(*(tensor.double() for tensor in heads(case)))
    names = ("student_hidden", "student_weight", "token_weights")
    trained = {name: getattr(inputs, name).requires_grad_() for name in names}
    per_token = divergence(*products(inputs), case)
    loss = (inputs.token_weights * per_token).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return Outcome(per_token.detach(), loss.detach(), dict(zip(trained, gradients, strict=True)))


def on_logits(case: Case) -> Outcome:
    """What `vocab_parallel_divergence` must give over the whole vocabulary."""
    inputs = Logits(*(tensor.double() for tensor in logits(case)))
    inputs.student.requires_grad_()
    per_token = divergence(inputs.student, inputs.teacher, case)
    loss = (inputs.upstream * per_token).sum()
    (gradient,) = torch.autograd.grad(loss, inputs.student)
    return Outcome(per_token.detach(), loss.detach(), {"student_logits": gradient})


def check_fused(case: Case, found: Sequence[Outcome]) -> None:
    """What each rank's `fused_linear_divergence` gave, against the whole vocabulary."""
    want = fused(case)
    check_loss(case, found[0], want)
    for rank in found:  # the gradient of student_hidden is complete on each
        check_gradient(case, rank.gradients["student_hidden"], want.gradients["student_hidden"])
        check_gradient(case, rank.gradients["token_weights"], want.gradients["token_weights"])
    weight = torch.cat([rank.gradients["student_weight"] for rank in found])
    check_gradient(case, weight[: case.vocabulary], want.gradients["student_weight"])
    assert not weight[case.vocabulary :].any(), "padded rows of the output head moved"


def check_on_logits(case: Case, found: Sequence[Outcome]) -> None:
    """What each rank's `vocab_parallel_divergence` gave, against the whole vocabulary."""
    want = on_logits(case)
    check(case, found[0].per_token, want.per_token, 1e-6)
    gradient = torch.cat([rank.gradients["student_logits"] for rank in found], dim=1)
    check_gradient(case, gradient[:, : case.vocabulary], want.gradients["student_logits"])
    assert not gradient[:, case.vocabulary :].any(), "padded columns received a gradient"


def check_loss(case: Case, found: Outcome, want: Outcome) -> None:
    """The divergence of every token, and their weighted sum, within 1e-6."""
    check(case, found.per_token, want.per_token, 1e-6)
    weights = heads(case).token_weights.double().abs()
    size = (weights * want.per_token).sum().item()  # not the loss, where weights of both signs cancel
    assert abs(found.loss.item() - want.loss.item()) <= _allowed(case, 1e-6, size, floor=weights.sum().item())


def check_gradient(case: Case, found: Tensor, want: Tensor) -> None:
    """In the dtype of the input, within 1e-5 of the largest."""
    assert found.dtype == case.dtype
    check(case, found, want, 1e-5)


def check(case: Case, found: Tensor, want: Tensor, relative: float) -> None:
    """Within `relative` of the largest of `want`. NaN compares as false, hence never passes."""
    assert found.shape == want.shape, (found.shape, want.shape)
    if want.numel() > 0:
        difference = (found.double() - want.double()).abs().max().item()
        assert difference <= _allowed(case, relative, want.abs().max().item()), (found, want)


def _allowed(case: Case, relative: float, size: float, floor: float = 1.0) -> float:
    """`relative` of `size`, plus an ulp of `floor`: float32 probabilities cost that much however small the result.

    Both shrink by 1e-7 in float64, so that those cases test the mathematics apart from the rounding.
    """
    if case.spread < 0.1:  # nearly equal sides: D is a difference of log-probabilities near -3, whose ulp is larger
        floor *= 4
    error = relative * size + torch.finfo(torch.float32).eps * floor
    return error * 1e-7 if case.dtype == torch.float64 else error
