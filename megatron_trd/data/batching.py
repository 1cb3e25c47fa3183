"""Samples -> data-parallel shares -> micro-batches.

The loss covers response positions only: the hidden state at position `prompt + t - 1` predicts response token `t`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Side = Literal["student", "teacher"]


@dataclass(frozen=True)
class Sample:
    """One training sequence: two prompts and one response, with token ids as the sampler returned them."""

    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    response: tuple[int, ...]
    sampler_log_probs: tuple[float, ...]  # of the response tokens, as sampled
    weight: float = 1.0  # of this sequence in the step's loss

    def tokens(self, side: Side) -> tuple[int, ...]:
        """Model input: the prompt and all response tokens but the last, which has no successor to predict."""
        prompt = self.student_prompt if side == "student" else self.teacher_prompt
        return prompt + self.response[:-1]


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded inputs of a few samples. Padding follows every real token, so causal attention never sees it."""

    samples: tuple[int, ...]  # indices into the step's sample list
    tokens: Tensor  # [batch, length] int64
    positions: Tensor  # [batch, length] int64
    rows: Tensor  # [response tokens] int64: batch row of each response position, samples in order
    columns: Tensor  # [response tokens] int64: input position whose hidden state predicts the token
    response: Tensor  # [response tokens] int64: the tokens themselves
    sampler_log_probs: Tensor  # [response tokens] float32: of the tokens, as sampled
    weights: Tensor  # [response tokens] float32: weight of each token in the step's loss
    lengths: tuple[int, ...]  # response tokens of each sample

    def select(self, hidden: Tensor) -> Tensor:
        """Hidden states `[length, batch, hidden]` -> those at response positions, `[response tokens, hidden]`."""
        return hidden[self.columns, self.rows]


def normalize(samples: Sequence[Sample], by: Literal["sequence", "token"]) -> list[Sample]:
    """Samples whose weights make the step's loss a mean: over sequences of the mean over tokens, or over all tokens.

    In the result, `weight` is the weight of each *token* of the sample; the weights of the step's tokens sum to one.
    """
    total = sum(len(sample.response) if by == "token" else 1 for sample in samples)
    return [
        replace(sample, weight=1.0 / total / (len(sample.response) if by == "sequence" else 1)) for sample in samples
    ]


def deal(samples: Sequence[Sample], shares: int, cost: Callable[[Sample], int]) -> list[list[int]]:
    """Sample indices for each of `shares` replicas: costliest first, each to the replica with the least work so far."""
    dealt: list[list[int]] = [[] for _ in range(shares)]
    load = [0] * shares
    for index in sorted(range(len(samples)), key=lambda index: (-cost(samples[index]), index)):
        share = load.index(min(load))
        dealt[share].append(index)
        load[share] += cost(samples[index])
    return dealt


def micro_batches(
    samples: Sequence[Sample],
    indices: Sequence[int],
    side: Side,
    *,
    size: int,
    multiple: int,
    device: torch.device,
    count: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of `size` samples of similar length; lengths are padded to `multiple` (sequence parallelism).

    A replica with fewer than `count` gets additional ones of weight zero: one, because every replica takes part in the
    step's collectives, or as many as the replicas with which it shares experts have.
    """
    order = sorted(indices, key=lambda index: (-len(samples[index].tokens(side)), index))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [_micro_batch(samples, group, side, multiple, device, names=tuple(group)) for group in groups]
    least = min(samples, key=lambda sample: len(sample.tokens(side)))  # the other replicas wait for it
    idle = [replace(least, response=least.response[:1], sampler_log_probs=least.sampler_log_probs[:1], weight=0.0)]
    return batches + [_micro_batch(idle, [0], side, multiple, device, names=())] * (count - len(batches))


def _micro_batch(
    samples: Sequence[Sample],
    group: Sequence[int],
    side: Side,
    multiple: int,
    device: torch.device,
    names: tuple[int, ...],
) -> MicroBatch:
    inputs = [samples[index].tokens(side) for index in group]
    length = -(-max(len(ids) for ids in inputs) // multiple) * multiple
    tokens = torch.zeros(len(group), length, dtype=torch.long)
    rows, columns, response, log_probs, weights = [], [], [], [], []
    for row, (index, ids) in enumerate(zip(group, inputs, strict=True)):
        sample = samples[index]
        tokens[row, : len(ids)] = torch.tensor(ids)
        count = len(sample.response)
        rows.append(torch.full((count,), row))
        columns.append(torch.arange(len(ids) - count, len(ids)))
        response.append(torch.tensor(sample.response))
        log_probs.append(torch.tensor(sample.sampler_log_probs))
        weights.append(torch.full((count,), sample.weight))
    return MicroBatch(
        samples=names,
        tokens=tokens.to(device),
        positions=torch.arange(length).expand(len(group), -1).contiguous().to(device),
        rows=torch.cat(rows).to(device),
        columns=torch.cat(columns).to(device),
        response=torch.cat(response).to(device),
        sampler_log_probs=torch.cat(log_probs).to(device),
        weights=torch.cat(weights).to(device),
        lengths=tuple(len(samples[index].response) for index in group),
    )
