"""One rank on what this machine has: a GPU, if torch sees one (CONTRIBUTING.md says how to run this on its node).

What is exact on a CPU, in float32, has the bounds of bf16 on a GPU.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trd import platform
from tests.distributed import run_ranks
from tests.engines import test_lora
from tests.engines.test_numerics import compare, compare_in_bf16, expected, expert_layout, layout, run_layouts
from tests.models import write_model
from tests.training import jobs

IN_BF16 = platform.current().dtype == torch.bfloat16
DRIFT = 0.02 if IN_BF16 else 1e-5  # mean nats between sampler and trainer
SMALL: dict[str, Any] = {"head_dim": 64, "max_position_embeddings": 1024, "dtype": platform.current().dtype}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("qwen3", layout(1, 1, 1, 1, micro_batch_size=5)),
        ("qwen3", layout(1, 1, 1, 1, recompute=True)),
        ("llama", layout(1, 1, 1, 1)),
        ("qwen2", layout(1, 1, 1, 1)),
        ("qwen3_moe", expert_layout(1, 1, 1, 1)),
    ],
)
def test_a_step_is_the_dense_one_s(tmp_path: Path, family: str, case: dict[str, Any]) -> None:
    student = write_model(tmp_path / "student", family=family, seed=7, **SMALL)
    teacher = write_model(tmp_path / "teacher", family=family, seed=8, **SMALL)
    [found] = run_ranks(run_layouts, 1, str(student), str(teacher), [case], backend=platform.current().backend)[0]
    want = expected(student, teacher)
    if IN_BF16:
        compare_in_bf16(found, want, family)
    else:
        compare(found, want, case)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3_moe"])
def test_a_step_of_adapters_is_peft_s(tmp_path: Path, family: str) -> None:
    model, case = write_model(tmp_path / "model", family=family, seed=7, **SMALL), test_lora.adapted(1, 1, "frozen")
    arguments = str(model), None, [case | {"student": case["student"] | {"recompute": True}}]
    [found] = run_ranks(test_lora.run_adapted, 1, *arguments, backend=platform.current().backend)[0]
    want = test_lora.expected(model, None, "frozen")
    if IN_BF16:
        compare_in_bf16(found, want, family)
    else:
        compare(found, want, case)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one rank that checks every refit and bounds its drift; a GPU leaves nothing in it to chance."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    return jobs.write_job(
        tmp_path,
        fields=SMALL,
        student={"micro_batch_size": 2},
        teacher={"weights": "frozen"},
        sampler={"max_rollout_tokens": 24, "max_refinement_tokens": 24, "memory_fraction": 0.05, "enforce_eager": True},
        log={"verify_refit": True, "max_drift": DRIFT},
        world_size=1,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Of a whole run."""
    rows = jobs.metrics(folder)
    assert len(rows) == jobs.STEPS
    for row in rows:
        assert row["samples/trained"] == 3
        assert row["loss"] > 0
        assert row["refit/verified"] > 20
        assert row["drift/mean"] < DRIFT
    return rows


def test_what_moves_memory_changes_nothing_and_a_resumed_run_has_the_same_bits(job: Path, tmp_path: Path) -> None:
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    jobs.finish(jobs.start("train", job, f"run_dir={plain}", "sampler.sleep=false"))
    settings = [f"run_dir={moved}", "student.offload=true", "teacher.offload=true", "teacher.hidden_in=host"]
    process = jobs.start("train", job, *settings)
    jobs.wait_for(lambda: len(jobs.metrics(moved)) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    jobs.finish(process, code=130)
    assert len(jobs.metrics(moved)) < jobs.STEPS, "stopped too late to test anything"
    jobs.finish(jobs.start("train", job, *settings, "--resume"))
    for row, other in zip(metrics(moved), metrics(plain), strict=True):
        assert [row[key] for key in ("loss", "grad_norm")] == [other[key] for key in ("loss", "grad_norm")]
    asked = ["--model", moved / f"checkpoints/step_{jobs.STEPS}", "--data", tmp_path / "data.jsonl", "--samples", "2"]
    jobs.finish(jobs.start("eval", *asked, "--out", tmp_path / "eval", "sampler.memory_fraction=0.05"))
    assert json.loads((tmp_path / "eval/scores.json").read_text())["problems"] == 6


def test_adapters_are_merged_for_the_sampler_and_resume(job: Path, tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path / 'run'}", "lora.rank=8", "student.offload=true"]
    process = jobs.start("train", job, *settings)
    jobs.wait_for(lambda: len(jobs.metrics(tmp_path / "run")) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    jobs.finish(process, code=130)
    jobs.finish(jobs.start("train", job, *settings, "--resume"))
    assert all(row["drift/rollout"] < DRIFT for row in metrics(tmp_path / "run"))


def test_a_mixture_of_experts_teaches_by_an_engine_of_its_own(job: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", family="qwen3_moe", seed=3, hidden_size=128, **SMALL)
    settings = [f"run_dir={tmp_path / 'run'}", "method=trd-opd", f"teacher.model={teacher}"]
    jobs.finish(jobs.start("train", job, *settings, "sampler.enforce_eager=false"))
    metrics(tmp_path / "run")


def test_a_mixture_of_experts_teaches_itself_while_it_is_sampled(job: Path, tmp_path: Path) -> None:
    student = write_model(tmp_path / "experts", family="qwen3_moe", seed=3, **SMALL)
    jobs.finish(jobs.start("train", job, f"run_dir={tmp_path / 'run'}", f"model={student}", "teacher.weights=live"))
    metrics(tmp_path / "run")
