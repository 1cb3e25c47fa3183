"""What a GPU's layers do, without a GPU (tests/engines/transformer_engine.py), held to what the CPU's are held to."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd import platform
from megatron_trd.config import apply_overrides, load
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning import sizes
from megatron_trd.planning.devices import TRANSFORMER_ENGINE
from tests.checkpoint_tools.folders import assert_same_model, write_bits
from tests.checkpoint_tools.test_layouts import EXPERTS, MODELS, YARN, load_and_save, saved
from tests.distributed import run_ranks
from tests.engines import test_lora
from tests.engines.test_numerics import (
    EXPERT_CASES,
    compare_in_bf16,
    compare_ranks,
    expected,
    expert_layout,
    layout,
    prepare,
    run_layouts,
)
from tests.models import write_model
from tests.planning.test_sizes import DENSE as DENSE_SHAPE
from tests.planning.test_sizes import EXPERTS as EXPERTS_SHAPE
from tests.planning.test_sizes import saved_bytes
from tests.training import jobs, test_checkpoint
from tests.training.test_jobs import assert_same_run

PACKAGE = Path(sys.prefix) / "transformer-engine"
pytestmark = pytest.mark.skipif(not PACKAGE.exists(), reason="`make test` puts transformer-engine's Python there")


def with_its_layers(rank: int, world: int, dtype: torch.dtype, function: Callable[..., Any], *arguments: Any) -> Any:
    """Rank function: another one, in a process whose layers, and their optimizer, are transformer-engine's."""
    from tests.engines import transformer_engine

    transformer_engine.install(PACKAGE, dtype)
    return function(rank, world, *arguments)


DENSE = {
    2: [
        layout(2, 1, 2, 1, "live", sequence_parallel=True, recompute=True),
        layout(2, 1, 1, 2),
        layout(1, 2, 2, 1),
        layout(1, 1, 1, 2, distributed=True),
    ],
    4: [layout(2, 2, 2, 2, "live"), layout(2, 1, 2, 2, distributed=True)],
}


@pytest.mark.parametrize(
    ("family", "fields", "world", "cases"),
    [
        ("qwen3", {"tie_word_embeddings": True}, 2, DENSE[2]),
        ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 256}, 4, DENSE[4]),
        ("llama", {}, 2, DENSE[2][:1]),
        ("qwen2", {}, 2, DENSE[2][1:3]),
        ("qwen3_moe", {}, 2, EXPERT_CASES[2]),
        ("qwen3_moe", {}, 4, EXPERT_CASES[4]),
    ],
)
def test_layouts_agree_with_dense_float64(
    tmp_path: Path, family: str, fields: dict[str, Any], world: int, cases: list[dict[str, Any]]
) -> None:
    student = write_model(tmp_path / "student", family=family, seed=7, **fields)
    teacher = write_model(tmp_path / "teacher", family=family, seed=8, **fields)
    own = {"live": None, "frozen": str(teacher)}
    for weights, path in own.items():
        chosen = [case for case in cases if case["teacher"]["weights"] == weights]
        if not chosen:
            continue
        found = run_ranks(with_its_layers, world, torch.float32, run_layouts, str(student), path, chosen)
        want = expected(student, Path(path) if path else student)
        compare_ranks(found, want, chosen)


ADAPTED = [
    ("qwen3", "live", test_lora.adapted(2, 1, "live", sequence_parallel=True, recompute=True)),
    ("qwen2", "frozen", test_lora.adapted(1, 2)),
    ("qwen3_moe", "frozen", test_lora.adapted(2, 1, sequence_parallel=True, micro_batch_size=1)),
]


@pytest.mark.parametrize(("family", "weights", "case"), ADAPTED)
def test_adapters_agree_with_peft_in_float64(tmp_path: Path, family: str, weights: str, case: dict[str, Any]) -> None:
    """Its layers normalise their own input, which an adapter needs normalised too."""
    student = write_model(tmp_path / "student", family=family, seed=7)
    found = run_ranks(with_its_layers, 2, torch.float32, test_lora.run_adapted, str(student), None, [case])
    compare_ranks(found, test_lora.expected(student, None, weights), [case])


IN_BF16 = [
    ("qwen3", layout(2, 1, 2, 1, sequence_parallel=True, micro_batch_size=5)),  # one micro-batch: nothing is summed
    ("qwen3_moe", expert_layout(2, 1, 2, 2)),
]


@pytest.mark.parametrize(("family", "case"), IN_BF16)
def test_a_step_in_bf16_is_near_the_dense_one(tmp_path: Path, family: str, case: dict[str, Any]) -> None:
    student = write_model(tmp_path / "student", family=family, seed=7, dtype=torch.bfloat16)
    teacher = write_model(tmp_path / "teacher", family=family, seed=8, dtype=torch.bfloat16)
    arguments = str(student), str(teacher), [case]
    [found], *_ = run_ranks(with_its_layers, 2, torch.bfloat16, run_layouts, *arguments)
    compare_in_bf16(found, expected(student, teacher), family)


def rounded(rank: int, world: int, model: str, case: dict[str, Any]) -> dict[str, float]:
    """Rank function: of the gradient of each matrix of the layers, the share of values that bf16 can hold."""
    platform.current().set_up()
    student, teacher, samples, share, hidden = prepare(model, None, case)
    student.backward(samples, share, hidden, teacher.head)
    found = {}
    for name, parameter in student.model.named_parameters():
        if parameter.dim() > 1 and ".linear_" in name:
            gradient = parameter.main_grad[parameter.main_grad != 0]
            found[name] = (gradient == gradient.bfloat16().float()).float().mean().item()
    return found


@pytest.mark.parametrize(("family", "case"), IN_BF16)
def test_gradients_of_weights_in_bf16_are_float32_sums(tmp_path: Path, family: str, case: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", family=family, dtype=torch.bfloat16)
    for found in run_ranks(with_its_layers, 2, torch.bfloat16, rounded, str(model), case):
        assert len(found) >= 4 * 4
        assert max(found.values()) < 0.1, found


@pytest.mark.parametrize(("name", "fields"), [("qwen3", MODELS["qwen3"]), ("qwen3 moe", EXPERTS["qwen3 moe"])])
def test_checkpoints_are_the_same_files_as_those_of_the_cpu_s_layers(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    """Converted ones are loaded, and those that are saved are converted back, to the last bit."""
    layouts = [(2, 1, 2), (1, 2, 2)] if name in EXPERTS else [(2, 2, 1)]
    write_bits(tmp_path / name / "hf", **fields)
    hf_to_megatron.convert(tmp_path / name / "hf", tmp_path / name / "megatron")
    wrong = run_ranks(with_its_layers, 4, torch.float32, load_and_save, str(tmp_path), [name], layouts)
    assert wrong == [[]] * 4
    for one in layouts:
        megatron_to_hf.convert(tmp_path / name / saved(*one), tmp_path / name / f"hf {saved(*one)}")
        assert_same_model(tmp_path / name / "hf", tmp_path / name / f"hf {saved(*one)}")


LENGTH = 64


def test_activations_grow_with_the_sizes_of_a_layer_as_planned() -> None:
    """All but attention's, which is another's here. What it keeps is cancelled in the difference of two models."""
    dense = [DENSE_SHAPE, replace(DENSE_SHAPE, hidden_size=256), replace(DENSE_SHAPE, ffn_size=384)]
    experts = [EXPERTS_SHAPE, replace(EXPERTS_SHAPE, expert_ffn_size=128), replace(EXPERTS_SHAPE, hidden_size=256)]
    cases = [(arch, 2, True, False, LENGTH) for arch in dense + experts]
    cases += [(arch, 1, False, False, LENGTH) for arch in dense + experts]
    [found, _] = run_ranks(with_its_layers, 2, torch.bfloat16, saved_bytes, cases)
    planned = [
        sizes.kept_by_layer(arch, Layout(tp, 1, 2), LENGTH, TRANSFORMER_ENGINE, sequence_parallel=sequence_parallel)
        for arch, tp, sequence_parallel, *_ in cases
    ]
    for first in range(0, len(cases), 3):
        for other in (first + 1, first + 2):
            grown = found[other] - found[first]
            assert grown == pytest.approx(planned[other] - planned[first], rel=0.03), cases[other]


def run_job(rank: int, world: int, job: str, overrides: list[str], resume: bool) -> None:
    """Rank function: a whole training run."""
    from megatron_trd.training.loop import train
    from megatron_trd.training.run import Run
    from megatron_trd.training.run_folder import claim

    config = apply_overrides(load(Path(job)), overrides)
    if rank == 0:
        claim(config, resume=resume)
    train(Run(config, resume=resume))


RUNS: dict[str, dict[str, Any]] = {
    "dense, TP": {"student": {"tp": 2, "micro_batch_size": 2}},
    "dense, DP, offloaded": {
        "student": {"micro_batch_size": 2, "distributed_optimizer": True, "offload": True},
        "teacher": {"weights": "frozen", "offload": True, "tp": 2},
    },
    "experts, TP and EP": {
        "student": {"tp": 2, "ep": 2, "sequence_parallel": True, "micro_batch_size": 2},
        "teacher": {"weights": "live"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_bf16_resumes_with_the_same_bits(tmp_path: Path, name: str) -> None:
    settings = RUNS[name] | {"log": {"verify_refit": True}}
    if name.startswith("experts"):
        experts = write_model(tmp_path / "experts", family="qwen3_moe", max_position_embeddings=1024)
        settings |= {"model": str(experts)}
    job = jobs.write_job(tmp_path, **settings)
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    run_ranks(with_its_layers, 2, torch.bfloat16, run_job, str(job), [f"run_dir={unbroken}"], False)
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / f"checkpoints/step_{jobs.STEPS}")
    run_ranks(with_its_layers, 2, torch.bfloat16, run_job, str(job), [f"run_dir={run}"], True)
    assert_same_run(run, unbroken)
    for row in jobs.metrics(run):
        assert row["samples/trained"] == 3
        assert row["refit/verified"] > 0
        assert row["drift/mean"] < 0.02, "nats between sampler and trainer, both in bf16"


@pytest.mark.parametrize(
    ("family", "cases"), [("qwen3", test_checkpoint.DENSE), ("qwen3_moe", test_checkpoint.EXPERTS)]
)
def test_its_optimizer_s_state_goes_on_in_another_layout(tmp_path: Path, family: str, cases: list[Any]) -> None:
    model = write_model(tmp_path / "model", family=family)
    cases = [(test_checkpoint.distributed(first), test_checkpoint.distributed(second)) for first, second in cases]
    arguments = str(model), str(tmp_path), cases
    errors, _ = run_ranks(with_its_layers, 2, torch.float32, test_checkpoint.go_on, *arguments)
    for error, case in zip(errors, cases, strict=True):
        assert error < 2e-3, case


def run_and_look(rank: int, world: int, job: str, overrides: list[str]) -> list[int]:
    """Rank function: a whole training run; tensors that its refits still held each time the cache took its
    memory."""
    from megatron_trd.engines.engine import Engine
    from megatron_trd.models.gathering import GatheredSource

    found = []
    wake = Engine.wake

    def waking(engine: Engine, memory: Literal["weights", "kv_cache"]) -> None:
        if memory == "kv_cache":
            found.append(sum(len(each._full) for each in gc.get_objects() if isinstance(each, GatheredSource)))
        wake(engine, memory)

    with mock.patch.object(Engine, "wake", waking):
        run_job(rank, world, job, overrides, False)
    return found


@pytest.mark.parametrize("teacher", ["ema", "live"])
def test_a_refit_s_buckets_are_gone_before_the_cache_takes_its_memory(tmp_path: Path, teacher: str) -> None:
    job = jobs.write_job(tmp_path, steps=2, held_out={}, teacher={"weights": teacher})
    overrides = [f"run_dir={tmp_path / 'run'}", "sampler.one_engine=false", "log.verify_refit=true"]
    for found in run_ranks(with_its_layers, 2, torch.float32, run_and_look, str(job), overrides):
        assert found == [0, 0]


def test_a_teacher_of_its_own_is_verified_in_the_dtype_that_it_has_here(tmp_path: Path) -> None:
    experts = write_model(tmp_path / "experts", family="qwen3_moe", max_position_embeddings=1024)  # float32 on disk
    teacher = {"model": str(experts), "weights": "frozen"}
    log = {"verify_refit": True}
    job = jobs.write_job(tmp_path, method="trd-opd", student={}, teacher=teacher, steps=1, held_out={}, log=log)
    run = tmp_path / "run"
    run_ranks(with_its_layers, 1, torch.bfloat16, run_job, str(job), [f"run_dir={run}"], False)
    [row] = jobs.metrics(run)
    assert row["samples/trained"] == 3
