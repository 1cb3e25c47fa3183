"""The cases that both losses go through at every tensor-parallel size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.losses.reference import Case

WORLDS = (1, 2, 4)

DIVERGENCES = {
    "forward_kl": Case("forward_kl"),
    "reverse_kl": Case("reverse_kl"),
    **{f"jsd({beta})": Case("jsd", beta=beta) for beta in (0.001, 0.01, 0.3, 0.5, 0.9, 0.999)},
}

THREE = ("forward_kl", "reverse_kl", "jsd(0.3)")

# Of the objective, for every divergence. The clips leave some tokens alone and bind for others (tested).
OBJECTIVES: dict[str, dict[str, Any]] = {
    "": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 3": {"temperature": 3.0},
    "top 4": {"top_k": 4},
    "top 13, more than a shard of two or four has": {"top_k": 13},
    "top 4 and tail": {"top_k": 4, "tail": True},
    "top 13 and tail, hot": {"top_k": 13, "tail": True, "temperature": 2.0},
}

# Of the inputs, for one divergence of each kind.
INPUTS: dict[str, dict[str, Any]] = {
    "top 1": {"top_k": 1},
    "top 40, more than the vocabulary has": {"top_k": 40},
    "top 5 with many ties": {"top_k": 5, "teacher_hidden": 1, "vocabulary": 30, "tokens": 12},
    "top 5, hot": {"top_k": 5, "temperature": 2.0},
    "top 1 and tail": {"top_k": 1, "tail": True},
    "top 40 and tail, more than the vocabulary has": {"top_k": 40, "tail": True},
    "all but one and tail": {"top_k": 23, "tail": True},
    "top 5 and tail with many ties": {"top_k": 5, "tail": True, "teacher_hidden": 1, "vocabulary": 30, "tokens": 12},
    "padded vocabulary": {"vocabulary": 23},
    "padded vocabulary, top 9 and tail": {"vocabulary": 23, "top_k": 9, "tail": True},
    "padded vocabulary, top 9": {"vocabulary": 23, "top_k": 9},
    "much padding": {"vocabulary": 21, "width": 32},
    "a shard of four without columns": {"vocabulary": 9},
    "a shard of four without columns, top 4": {"vocabulary": 9, "top_k": 4},
    "a shard of four without columns, top 4 and tail": {"vocabulary": 9, "top_k": 4, "tail": True},
    "all columns in the first shard, top 4 and tail": {"vocabulary": 5, "width": 6, "top_k": 4, "tail": True},
    "all columns in the first shard": {"vocabulary": 5, "width": 6},
    "all columns in the first shard, top 4": {"vocabulary": 5, "width": 6, "top_k": 4},
    "one column": {"vocabulary": 1},
    "no token": {"tokens": 0},
    "no token, top 4": {"tokens": 0, "top_k": 4},
    "no token, top 4 and tail": {"tokens": 0, "top_k": 4, "tail": True},
    "one token": {"tokens": 1},
    "weights zero": {"weights": "zero"},
    "weights of both signs": {"weights": "signed"},
    "logits of 1e4": {"spread": 1e4},
    "logits of 1e4, cold": {"spread": 1e4, "temperature": 0.5},
    "logits of 1e4, top 4": {"spread": 1e4, "top_k": 4},
    "logits of 1e4, top 4 and tail, cold": {"spread": 1e4, "top_k": 4, "tail": True, "temperature": 0.5},
    "close to the teacher": {"spread": 0.02},
    "float64": {"dtype": torch.float64, "temperature": 1.3},
    "float64, top 4 and tail": {"dtype": torch.float64, "temperature": 1.3, "top_k": 4, "tail": True},
}

CLIPS = {"forward_kl": 2.7, "reverse_kl": 1.5, "jsd(0.3)": 0.37}


def common() -> dict[str, Case]:
    """Every divergence with every objective; three of them with every input, and clipped."""
    cases = {
        f"{name} {what}".strip(): replace(base, seed=number, **values)
        for number, (name, base) in enumerate(DIVERGENCES.items())
        for what, values in OBJECTIVES.items()
    }
    for number, name in enumerate(THREE):
        base = replace(DIVERGENCES[name], seed=100 + number)
        cases |= {f"{name} {what}": replace(base, **values) for what, values in INPUTS.items()}
        clipped = replace(base, clip=CLIPS[name], tokens=12)
        cases[f"{name} clip"] = clipped
        cases[f"{name} clip, top 6 and tail"] = replace(clipped, top_k=6, tail=True, clip=0.7 * CLIPS[name])
        cases[f"{name} clip, top 6, hot"] = replace(clipped, top_k=6, temperature=1.5, clip=CLIPS[name] / 2)
    return cases


def for_fused() -> dict[str, Case]:
    """The common ones and every cut into chunks."""
    cases = common()
    for name in THREE:
        for chunk in (1, 4, 7, 100):
            cases[f"{name} chunks of {chunk}"] = replace(DIVERGENCES[name], tokens=13, chunk_tokens=chunk, top_k=None)
        cases[f"{name} chunks of 4, top 4"] = replace(DIVERGENCES[name], tokens=13, chunk_tokens=4, top_k=4)
    return cases


def for_logits() -> dict[str, Case]:
    """The common ones, large offsets and masked columns wherever the divergence stays finite."""
    cases = common()
    for name in THREE:
        for offset in (1e2, -1e4, 1e4):
            cases[f"{name} offset {offset:g}"] = replace(DIVERGENCES[name], offset=offset)
        cases[f"{name} masked"] = replace(DIVERGENCES[name], masked="both")
        for offset in (-1e4, 1e4):
            cases[f"{name} offset {offset:g}, top 4 and tail"] = replace(
                DIVERGENCES[name], offset=offset, top_k=4, tail=True
            )
        cases[f"{name} masked, top 4 and tail"] = replace(DIVERGENCES[name], masked="both", top_k=4, tail=True)
        cases[f"{name} masked, top 12"] = replace(DIVERGENCES[name], masked="both", top_k=12)
    cases["forward_kl teacher masked"] = Case("forward_kl", masked="teacher")
    cases["reverse_kl student masked"] = Case("reverse_kl", masked="student")
    cases["jsd teacher masked"] = Case("jsd", beta=0.3, masked="teacher")
    cases["jsd student masked"] = Case("jsd", beta=0.3, masked="student")
    return cases
