"""The step's loss and gradients, dense and in float64, from `transformers` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_trd.data.batching import Sample


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def by_disk_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the name a folder has them under: `transformers` holds all experts of a layer in one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, fused, part = name.partition(".mlp.experts.")
        for expert, rows in enumerate(tensor if fused else []):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            for key, half in zip(names, rows.chunk(len(names)), strict=True):
                found[f"{layer}{fused}{expert}.{key}.weight"] = half
        if not fused:
            found[name] = tensor
    return found


def response_logits(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """`[response tokens, vocab]` logits that predict each response token."""
    ids = torch.tensor([*prompt, *response[:-1]])[None]
    return model(ids).logits[0, len(prompt) - 1 :]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each token, from logits."""
    t, s = teacher.log_softmax(-1), student.log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(student || teacher) of each token, from logits."""
    return forward_kl(student, teacher)


def jsd(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student."""
    t, s = teacher.softmax(-1), student.softmax(-1)
    log_m = (beta * t + (1 - beta) * s).log()
    return beta * (t * (t.log() - log_m)).sum(-1) + (1 - beta) * (s * (s.log() - log_m)).sum(-1)


def top_k(teacher: Tensor, student: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits of both on the teacher's k most probable tokens."""
    kept = teacher.topk(k, dim=-1).indices
    return teacher.gather(-1, kept), student.gather(-1, kept)


def step_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    samples: Sequence[Sample],
    divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl,
) -> Tensor:
    """Mean over sequences of the mean over response tokens (the paper's objective)."""
    losses = []
    for sample in samples:
        with torch.no_grad():
            target = response_logits(teacher, sample.teacher_prompt, sample.response)
        losses.append(divergence(target, response_logits(student, sample.student_prompt, sample.response)).mean())
    return torch.stack(losses).mean()
