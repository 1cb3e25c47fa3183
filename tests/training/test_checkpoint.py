"""A checkpoint goes on in another layout: weights, moments and step count, to rounding."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_trd.config import CheckpointConfig
from megatron_trd.data.batching import deal
from megatron_trd.engines.student import StudentEngine
from megatron_trd.engines.teacher import TeacherEngine
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.files import write_sums
from tests.checkpoint_tools.folders import Malicious, flip
from tests.distributed import run_ranks
from tests.engines import test_lora
from tests.engines.test_numerics import LR, engines, expert_layout, full_tensors, layout, make_samples
from tests.models import write_model

# Steps before the save and after it: the second moments are then far from those of a first step.
BEFORE, AFTER = 3, 2


def train(student: StudentEngine, teacher: TeacherEngine, steps: int) -> list[float]:
    """Take so many steps on the same samples; returns their rates."""
    samples = make_samples()
    shares = deal(samples, student.grid.layout.dp, cost=lambda sample: len(sample.tokens("student")))
    mine = shares[student.grid.dp_rank]
    return [student.train_step(samples, mine, teacher.hidden(samples, shares), teacher.head).lr for _ in range(steps)]


def go_on(rank: int, world: int, model: str, run_dir: str, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    """Rank function: for each (layout that saves, layout that goes on), how far apart the two are in
    the end, in steps of the optimizer."""
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.training import checkpoint

    platform.current().set_up()
    found = []
    for number, (first, second) in enumerate(cases):
        folder = f"{run_dir}/{number}"
        student, teacher = engines(model, None, first)
        # Merged ones are products, which another layout rounds in another way.
        trained = test_lora.adapters if student._adapters else full_tensors
        train(student, teacher, BEFORE)
        checkpoint.save(folder, BEFORE, student, teacher, CheckpointConfig())
        saved = trained(student)
        train(student, teacher, AFTER)
        expected = trained(student)
        parallel_state.destroy_model_parallel()
        student, teacher = engines(model, None, second)
        assert checkpoint.resume(folder, student, teacher) == BEFORE
        assert all(full.equal(saved[name]) for name, full in trained(student).items()), "weights are exact"
        train(student, teacher, AFTER)
        now = trained(student)
        found.append(max(float((now[name] - expected[name]).abs().max()) for name in expected) / LR)
        parallel_state.destroy_model_parallel()
    return found


def change(rank: int, world: int, model: str, run_dir: str, cases: list[dict[str, Any]]) -> Any:
    """Rank function: for each layout, the rate of the first step after resuming with settings changed on purpose, and
    what the groups of the optimizer then have."""
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.training import checkpoint

    platform.current().set_up()
    changed = {"lr": LR / 100, "weight_decay": 0.0, "beta2": 0.9, "eps": 1e-6, "warmup_fraction": 0.0}
    found = []
    for number, case in enumerate(cases):
        folder = f"{run_dir}/{number}"
        student, teacher = engines(model, None, case)
        train(student, teacher, BEFORE)
        checkpoint.save(folder, BEFORE, student, teacher, CheckpointConfig())
        parallel_state.destroy_model_parallel()
        student, teacher = engines(model, None, case | {"steps": 40, "optimizer": changed | {"schedule": "cosine"}})
        checkpoint.resume(folder, student, teacher)
        [rate] = train(student, teacher, 1)
        groups = [
            group for part in platform.optimizer_parts(student.optimizer) for group in part.optimizer.param_groups
        ]
        found.append((rate, {(group["betas"], group["eps"], group["weight_decay"]) for group in groups}))
        parallel_state.destroy_model_parallel()
    return found


def test_settings_that_were_changed_on_purpose_are_those_that_train(tmp_path: Path) -> None:
    """A checkpoint has the rates and betas that it was written with, and a schedule of as many steps as there were."""
    model = write_model(tmp_path / "model")
    cases = [layout(2, 1, 1, 1), distributed(layout(1, 1, 1, 1))]
    for rate, groups in run_ranks(change, 2, str(model), str(tmp_path), cases)[0]:
        # the fourth of forty steps on a cosine that ends at 0 after the last
        assert rate == pytest.approx(LR / 100 * (1 + math.cos(math.pi * 4 / 41)) / 2)
        assert groups == {((0.9, 0.9), 1e-6, 0.0)}


def test_the_newest_and_each_so_many_are_kept() -> None:
    from megatron_trd.training.checkpoint import _superseded

    def dropped(**settings: Any) -> list[int]:
        saved = {step: Path(f"step_{step}") for step in (50, 100, 150, 200, 230)}
        return [int(path.name.removeprefix("step_")) for path in _superseded(saved, CheckpointConfig(**settings))]

    assert dropped() == [50, 100, 150]
    assert dropped(keep=1, keep_every=100) == [50, 150]
    assert dropped(keep=9) == []


def distributed(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"student": settings["student"] | {"distributed_optimizer": True}}


DENSE = [
    (layout(1, 1, 1, 1), layout(2, 1, 1, 1)),
    (layout(2, 1, 1, 1), layout(1, 2, 1, 1)),
    (layout(1, 2, 1, 1), layout(1, 1, 1, 1)),
]
EXPERTS = [
    (expert_layout(1, 1, 2, 1), expert_layout(1, 1, 1, 1)),
    (expert_layout(1, 1, 1, 1), expert_layout(2, 1, 2, 2)),
]


ADAPTED = [
    (test_lora.adapted(1, 1), test_lora.adapted(2, 1, sequence_parallel=True)),
    (test_lora.adapted(2, 1), test_lora.adapted(1, 2)),
    (test_lora.adapted(1, 2), test_lora.adapted(1, 1)),
]


@pytest.mark.parametrize(
    ("family", "cases"), [("qwen3", DENSE), ("qwen3_moe", EXPERTS), ("qwen3", ADAPTED), ("qwen2", ADAPTED)]
)
def test_a_checkpoint_goes_on_in_another_layout(family: str, cases: list[Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family=family)
    cases = [(distributed(first), distributed(second)) for first, second in cases]
    for error, case in zip(run_ranks(go_on, 2, str(model), str(tmp_path), cases)[0], cases, strict=True):
        assert error < 2e-3, case


def refusals(rank: int, world: int, model: str, run_dir: str) -> list[str]:
    """Rank function: what is said of a newest checkpoint that is damaged, of the only one that is left, and of one with
    a program in it."""
    from megatron_trd import platform
    from megatron_trd.training import checkpoint

    def said(change: Callable[[Path], object]) -> str:
        newest = list(checkpoint.checkpoints(run_dir).values())[-1]
        change(newest)
        with pytest.raises(UserError) as refused:
            checkpoint.resume(run_dir, student, teacher)
        shutil.rmtree(newest)
        return str(refused.value)

    platform.current().set_up()
    student, teacher = engines(model, None, layout(1, 1, 1, 1))
    for step in (1, 2, 3):
        checkpoint.save(run_dir, step, student, teacher, CheckpointConfig(keep=3))
    return [said(put_program_into), said(damage), said(damage)]


def damage(checkpoint: Path) -> None:
    flip(checkpoint / "__0_0.distcp")


def put_program_into(checkpoint: Path) -> None:
    """A program in the state of a layer, which megatron-core unpickles whatever it is, and checksums that fit."""
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    state = next(index for index in content.storage_data if "_extra_state" in index.fqn)
    program = checkpoint / "__1_0.distcp"
    torch.save([Malicious(checkpoint.parents[1] / "ran")], program)
    content.storage_data[state] = _StorageInfo(program.name, 0, program.stat().st_size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    write_sums(checkpoint)


def test_a_checkpoint_that_is_damaged_or_has_a_program_in_it_is_refused(tmp_path: Path) -> None:
    [said] = run_ranks(refusals, 1, str(write_model(tmp_path / "model")), str(tmp_path))
    malicious, damaged, only = said
    assert "__1_0.distcp' is damaged" in malicious
    assert not (tmp_path / "ran").exists()
    assert "__0_0.distcp' is damaged" in damaged
    assert damaged.endswith(f"or remove '{tmp_path}/checkpoints/step_2', to go on from step_1")
    assert "__0_0.distcp' is damaged" in only
    assert "to go on from" not in only


def save_where_nothing_can_be(rank: int, world: int, run_dir: str) -> str:
    from megatron_trd.training import checkpoint

    student = SimpleNamespace()
    with pytest.raises(JobFailed) as refused:
        checkpoint.save(run_dir, 3, student, student, CheckpointConfig())  # type: ignore[arg-type]
    return str(refused.value)


def test_a_run_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    said = run_ranks(save_where_nothing_can_be, 1, str(tmp_path))[0]
    assert "step_3' could not be written" in said
    assert "Not a directory" in said or "File exists" in said


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and megatron-core say that a write failed, and not why."""
    from megatron_trd.training.checkpoint import _writing

    def fail(error: BaseException) -> None:
        partial = tmp_path / "step_3.partial"
        (partial / "hf").mkdir(parents=True)
        try:
            with _writing(tmp_path / "step_3"):
                raise error
        finally:
            assert not partial.exists()

    room = {"free": 5 * 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(**room))
    with pytest.raises(JobFailed, match=r"step_3' could not be written, 5 MiB are free there: make room, and"):
        fail(RuntimeError("unexpected pos 320"))
    with pytest.raises(JobFailed, match="5 MiB are free there"):
        fail(CheckpointException("write", {0: _wrap_exception(RuntimeError("unexpected pos 320"))}))
    room["free"] = 2**40
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        fail(RuntimeError("a bug"))
    with pytest.raises(JobFailed, match="Disk quota exceeded"):
        fail(OSError(122, "Disk quota exceeded"))
