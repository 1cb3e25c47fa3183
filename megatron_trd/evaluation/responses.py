"""Graded responses of an evaluation, and the folder they are stored in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_trd.config import DataConfig, TrainConfig
from megatron_trd.data.problems import shown_answer
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.grading import are_correct
from megatron_trd.evaluation.scores import summarise
from megatron_trd.files import replace_text


def write_results(
    config: TrainConfig, prompts: PromptBuilder, trajectories: Sequence[Trajectory], *, seconds: float
) -> None:
    """Grade and write `responses.jsonl`, one line per response, and then `scores.json`.

    `trajectories` holds `config.rollouts_per_problem` consecutive responses to each problem.
    """
    rows = _rows(config.data, prompts, trajectories)
    samples = config.rollouts_per_problem
    scores = {
        "model": config.model,
        "data": config.data.path,
        "problems": len(rows) // samples,
        "samples": samples,
        "seed": config.seed,
        "temperature": config.sampler.temperature,
        **_summary(rows, samples, config.seed),
        "max_tokens": config.sampler.max_rollout_tokens,
        "seconds": seconds,
    }
    folder = Path(config.run_dir)
    replace_text(folder / "responses.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    replace_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")


def score(
    data: DataConfig, prompts: PromptBuilder, trajectories: Sequence[Trajectory], samples: int, *, seed: int
) -> dict[str, Any]:
    """avg@k, pass@k, the share of truncated responses and the mean length; `trajectories` holds `samples` consecutive
    responses to each problem."""
    return _summary(_rows(data, prompts, trajectories), samples, seed)


def _summary(rows: Sequence[dict[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    right = [[row["right"] for row in rows[start : start + samples]] for start in range(0, len(rows), samples)]
    return {
        **summarise(right, samples, seed=seed),
        "truncated": fmean(row["truncated"] for row in rows),
        "mean_tokens": fmean(row["tokens"] for row in rows),
    }


def _rows(data: DataConfig, prompts: PromptBuilder, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    texts = [prompts.decode(one.rollout.tokens) for one in trajectories]
    answers = [one.problem.answer or "" for one in trajectories]  # all have one: checked before the ranks were started
    return [
        {
            "index": trajectory.problem.index,
            "problem": trajectory.problem.problem,
            "answer": shown_answer(data, trajectory.problem),
            "response": text,
            "right": right,
            "truncated": trajectory.rollout.truncated,
            "tokens": len(trajectory.rollout.tokens),
        }
        for trajectory, text, right in zip(
            trajectories, texts, are_correct(data, list(zip(texts, answers, strict=True))), strict=True
        )
    ]
