"""Graded responses of an evaluation, and the folder they are stored in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_trd.config import TrainConfig
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.grading import is_correct
from megatron_trd.evaluation.scores import summarise
from megatron_trd.files import replace_text


def write_results(
    config: TrainConfig, prompts: PromptBuilder, trajectories: Sequence[Trajectory], *, seconds: float
) -> None:
    """Grade and write `responses.jsonl`, one line per response, and then `scores.json`.

    `trajectories` holds `config.rollouts_per_problem` consecutive responses to each problem.
    """
    rows = [_row(prompts, trajectory) for trajectory in trajectories]
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


def score(prompts: PromptBuilder, trajectories: Sequence[Trajectory], samples: int, *, seed: int) -> dict[str, Any]:
    """avg@k, pass@k, the share of truncated responses and the mean length; `trajectories` holds `samples` consecutive
    responses to each problem."""
    return _summary([_row(prompts, trajectory) for trajectory in trajectories], samples, seed)


def _summary(rows: Sequence[dict[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    right = [[row["right"] for row in rows[start : start + samples]] for start in range(0, len(rows), samples)]
    return {
        **summarise(right, samples, seed=seed),
        "truncated": fmean(row["truncated"] for row in rows),
        "mean_tokens": fmean(row["tokens"] for row in rows),
    }


def _row(prompts: PromptBuilder, trajectory: Trajectory) -> dict[str, Any]:
    problem, completion = trajectory.problem, trajectory.rollout
    assert problem.answer is not None  # checked before the ranks were started
    response = prompts.tokenizer.decode(completion.tokens, skip_special_tokens=True)
    return {
        "index": problem.index,
        "problem": problem.problem,
        "answer": problem.answer,
        "response": response,
        "right": is_correct(response, problem.answer),
        "truncated": completion.truncated,
        "tokens": len(completion.tokens),
    }
