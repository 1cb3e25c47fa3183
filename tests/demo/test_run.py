"""`megatron-trd demo` from end to end, with fewer steps and problems than a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_trd.demo import TEST_PROBLEMS
from megatron_trd.demo.run import run_demo


def test_the_demo_scores_base_method_and_baseline_and_reports(tmp_path: Path) -> None:
    method, baseline = "trd-opd", "opd-forward-kl"
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(TEST_PROBLEMS.read_text().splitlines(keepends=True)[:8]))
    out = tmp_path / "demo"
    report = run_demo(method, out, 3, ["steps=2", "batch_size=8"], problems)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["results"]) == ["base", method, baseline]
    for result in summary["results"].values():
        assert result["problems"] == 8
        assert result["seeds"] == [3]
        assert result["seconds"] > 0
        assert 0 <= result["avg@16"]["low"] <= result["avg@16"]["value"] <= result["pass@16"]["value"] <= 1
    assert 0.1 < summary["results"]["base"]["avg@16"]["value"] < 0.8
    html = report.read_text()
    for name in (method, baseline):
        assert name in html
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 2
    responses = [json.loads(line) for line in (out / "evaluation/base/responses.jsonl").read_text().splitlines()]
    assert len(responses) == 8 * 16
    right = sum(response["right"] for response in responses) / len(responses)
    assert right == pytest.approx(summary["results"]["base"]["avg@16"]["value"])
