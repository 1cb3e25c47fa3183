"""When the held-out problems are asked, and what their answers are worth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config import TrainConfig, from_dict
from megatron_trd.data.problems import Problem
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.engine import Completion
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.reporting.metrics import HELD_OUT_FILE, read_metrics
from megatron_trd.training.held_out import HeldOut
from megatron_trd.training.run import _Writers
from tests.data.tokenizers import tokenizer

PROBLEMS = [Problem(index, f"{index} + 1 = ?", str(index + 1), None) for index in range(3)]


def completion(text: str, *, truncated: bool) -> Completion:
    tokens = tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])
    return Completion(tokens, (0.0,) * len(tokens), truncated)


def config(**held_out: Any) -> TrainConfig:
    return from_dict({"steps": 7, "held_out": {"path": "data.jsonl"} | held_out}, "test")


def asked(config: TrainConfig, problems: list[Problem] = PROBLEMS) -> HeldOut:
    return HeldOut(config, problems, PromptBuilder(tokenizer()))


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 7]), (3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7])])
def test_the_ends_and_each_so_many_steps_are_due(every: int, steps: list[int]) -> None:
    assert [step for step in range(8) if asked(config(every=every)).due(step)] == steps


def test_without_problems_nothing_is_due() -> None:
    assert not any(asked(config(every=1), []).due(step) for step in range(8))


def test_each_problem_is_asked_as_often_as_its_samples_say() -> None:
    found = asked(config(samples=2))
    assert [problem.index for problem in found.problems] == [0, 0, 1, 1, 2, 2]
    assert found.prompts[0] == found.prompts[1] != found.prompts[2]


def test_scores_are_of_the_problems_in_their_order() -> None:
    found = asked(config(samples=2))
    texts = ["\\boxed{1}", "\\boxed{1}", "\\boxed{2}", "\\boxed{1}", "\\boxed{9}", "3"]
    responses = [
        Trajectory(problem, index, completion(text, truncated=text == "3"))
        for index, (problem, text) in enumerate(zip(found.problems, texts, strict=True))
    ]
    scores = found.scores(responses) | {"held_out/seconds": 1.25}
    assert scores["held_out/avg@2"] == pytest.approx(0.5)  # 2 of 2, 1 of 2, 0 of 2
    assert scores["held_out/pass@2"] == pytest.approx(2 / 3)
    assert scores["held_out/avg@2/low"] <= 0.5 <= scores["held_out/avg@2/high"]
    assert scores["held_out/truncated"] == pytest.approx(1 / 6)
    line = found.line(4, scores)
    assert line.startswith("held out, after 4 steps: avg@2 50.0% (")
    assert line.endswith("pass@2 66.7%, 1.2 s")


@pytest.mark.parametrize(("asks", "kept"), [(True, [0]), (False, [0, 3])])
def test_scores_that_will_not_be_asked_again_are_kept(tmp_path: Path, *, asks: bool, kept: list[int]) -> None:
    """A run that goes on after step 3 with another `held_out.every`."""
    (tmp_path / HELD_OUT_FILE).write_text("".join(f'{{"step": {step}}}\n' for step in (0, 3, 6)))
    run = dataclasses.replace(config(every=3), run_dir=str(tmp_path))
    _Writers(run, 3, asks=asks).close()
    assert [row["step"] for row in read_metrics(tmp_path, HELD_OUT_FILE)] == kept
