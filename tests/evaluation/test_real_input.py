"""HumanEval's own solutions pass its tests, wrong ones do not, and a real model's programs are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_trd.config import DataConfig
from megatron_trd.data.problems import load_problems
from megatron_trd.evaluation.grading import are_correct
from tests import real_input
from tests.marks import needs_sandbox, on_real_input
from tests.training import jobs

pytestmark = [*on_real_input, needs_sandbox]


def test_solutions_of_human_eval_pass_and_nothing_else_does(tmp_path: Path) -> None:
    path = real_input.write_programs(tmp_path / "programs.jsonl")
    data = DataConfig(
        path=str(path),
        task="code",
        problem_field="prompt",
        answer_field="test",
        reference_field="canonical_solution",
    )
    problems = load_problems(data)
    assert len(problems) == 164

    def grades(body: str | None) -> list[bool]:
        """Of HumanEval's functions with their own bodies, or with one body for all."""
        programs = [problem.problem + (body or problem.reference or "") for problem in problems]
        responses = [f"```python\n{program}\n```" for program in programs]
        return are_correct(
            data, [(text, problem.answer or "") for text, problem in zip(responses, problems, strict=True)]
        )

    assert all(grades(None))
    assert not any(grades("    return None\n"))
    assert not any(grades("    raise SystemExit\n"))


def test_a_real_model_writes_programs_that_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STARTUP_SECONDS", 1200)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = real_input.write_model(tmp_path / "model")
    programs = real_input.write_programs(tmp_path / "all.jsonl").read_text().splitlines(keepends=True)[:32]
    (tmp_path / "programs.jsonl").write_text("".join(programs))
    asked = ["--model", model, "--data", tmp_path / "programs.jsonl", "--out", tmp_path / "eval", "--samples", "1"]
    settings = ["task=code", "problem_field=prompt", "answer_field=test"]
    sampler = ["sampler.temperature=0.2", "sampler.max_rollout_tokens=256"]
    jobs.finish(jobs.start("eval", *asked, *(f"data.{setting}" for setting in settings), *sampler))
    rows = [json.loads(line) for line in (tmp_path / "eval/responses.jsonl").read_text().splitlines()]
    print((tmp_path / "eval/scores.json").read_text())
    assert any("```" in row["response"] for row in rows), "a real model writes programs"
    assert 0 < sum(row["right"] for row in rows) < len(rows), "some of which are right (5 of 32 were)"
