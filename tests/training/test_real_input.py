"""A real model on real problems: SmolLM2-135M-Instruct, GSM8K, TP 3, two TRD-OPSD steps, no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import real_input
from tests.marks import on_real_input
from tests.training import jobs

pytestmark = list(on_real_input)


def test_two_steps_of_trd_on_smollm2_and_gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STARTUP_SECONDS", 1200)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = real_input.write_model(tmp_path / "model")
    problems = real_input.write_problems(tmp_path / "problems.jsonl")
    run = tmp_path / "run"
    arguments = [f"model={model}", f"data.path={problems}", f"run_dir={run}", "--verify-refit"]
    jobs.finish(jobs.start("train", "opsd_smollm2_gsm8k", *arguments))
    rows = jobs.metrics(run)
    assert len(rows) == 2
    for row in rows:
        assert row["samples/trained"] > 0
        assert 0 < row["divergence/mean"] < 5
        assert row["grad_norm"] > 0
        assert row["drift/mean"] < 1e-3, "vLLM and Megatron agree on a real model's log-probabilities"
    assert rows[0]["loss"] != rows[1]["loss"]
    pairs = [json.loads(line) for line in (run / "samples/step_00000.jsonl").read_text().splitlines()]
    assert any(" the " in pair["rollout"] for pair in pairs), "a real model writes English"
    print(json.dumps(rows, indent=1))
