"""What an evaluation writes, and held-out scores, are of the problems' own answers or tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config import from_dict
from megatron_trd.data.problems import Problem
from megatron_trd.data.programs import ProgramTests
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.engine import Completion
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.responses import write_results
from megatron_trd.training.held_out import HeldOut
from tests.data.tokenizers import tokenizer
from tests.marks import needs_sandbox

SCRIPTS = ["```python\nprint(int(input()) + 1)\n```", "```python\nprint(3)\n```", "print(int(input()) + 1)"]
TESTS = [ProgramTests(inputs=("1", "2"), outputs=("2", "3")), ProgramTests(inputs=("1",), outputs=("2",))]


def completion(text: str) -> Completion:
    tokens = tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])
    return Completion(tokens, (0.0,) * len(tokens), False)


@pytest.mark.parametrize(
    ("task", "answers", "texts", "right"),
    [
        ("math", ["2", "3"], ["\\boxed{2}", "\\boxed{3}", "\\boxed{6/2}", "3"], [True, False, True, False]),
        pytest.param(
            "code",
            [tests.to_json() for tests in TESTS],
            [SCRIPTS[0], SCRIPTS[1], SCRIPTS[2], SCRIPTS[0]],
            [True, False, False, True],
            marks=needs_sandbox,
        ),
    ],
)
def test_each_response_is_graded_by_its_own_problem(
    task: str, answers: list[str], texts: list[str], right: list[bool], tmp_path: Path
) -> None:
    values: dict[str, Any] = {"run_dir": str(tmp_path), "rollouts_per_problem": 2, "data": {"task": task}}
    config = from_dict(values | {"held_out": {"path": "data.jsonl", "samples": 2}}, "test")
    problems = [Problem(index, f"problem {index}", answer, None) for index, answer in enumerate(answers)]
    prompts = PromptBuilder(tokenizer(), task)
    held_out = HeldOut(config, problems, prompts)
    trajectories = [
        Trajectory(problem, index, completion(text))
        for index, (problem, text) in enumerate(zip(held_out.problems, texts, strict=True))
    ]
    write_results(config, prompts, trajectories, seconds=1.0)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows] == right
    assert [row["response"] for row in rows] == texts
    assert [row["answer"] for row in rows] == ([answers[0]] * 2 + [answers[1]] * 2 if task == "math" else [None] * 4)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["avg@2"]["value"] == held_out.scores(trajectories)["held_out/avg@2"] == 0.5
