"""The reference implementation: whole logits and ordinary autograd. It shares no code with the engine it checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    clip: float | None = None,
    top_k: int | None = None,
    tail: bool = False,
) -> Tensor:
    """Divergence of every token, straight from the definitions in docs/method.md.

    Args:
        student_logits: `[tokens, vocabulary]`, any floating dtype; the result is computed in that dtype.
        teacher_logits: `[tokens, vocabulary]`; no gradient flows into it.
        divergence: `forward_kl` = KL(teacher || student), `reverse_kl` or `jsd`.
        beta: weight of the teacher in the mixture of `jsd`.
        temperature: divides the logits of both sides.
        clip: upper bound of one token's divergence.
        top_k: keep only the teacher's `top_k` most probable tokens (the lower index first among equals) and
            renormalise both sides on them.
        tail: with `top_k`, do not renormalise: the other tokens together form one more outcome.

    Returns:
        `[tokens]`, differentiable in `student_logits`.
    """
    logits = [student_logits / temperature, teacher_logits.detach() / temperature]
    if top_k is not None:
        order = torch.sort(teacher_logits.detach(), dim=-1, descending=True, stable=True).indices
        kept, rest = order[..., :top_k], order[..., top_k:]
        logits = [
            torch.cat([side.gather(-1, kept), *_together(side.gather(-1, rest), tail)], dim=-1) for side in logits
        ]
    log_s, log_t = (torch.log_softmax(side, dim=-1) for side in logits)
    if divergence == "forward_kl":
        result = _kl(log_t, log_s)
    elif divergence == "reverse_kl":
        result = _kl(log_s, log_t)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        result = beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)
    else:
        raise ValueError(f"unknown divergence {divergence!r}")
    return result if clip is None else result.clamp(max=clip)


def _together(logits: Tensor, wanted: bool) -> list[Tensor]:
    """As a list, the logit `[tokens, 1]` of all these outcomes together; empty if there are none."""
    return [logits.logsumexp(dim=-1, keepdim=True)] if wanted and logits.shape[-1] else []


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
