"""An averaged teacher of 16-bit weights: the average is exact to float32, whatever the weights can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_trd.config import from_dict
from tests.distributed import run_ranks
from tests.models import write_model

DECAY = 0.99
UPDATES = 12


def follow(rank: int, world: int, model: str, run_dir: str) -> dict[str, Any]:
    """Rank function: a teacher at TP 2 follows a student that moves, both in bf16; and the same after a checkpoint."""
    from megatron_trd import platform
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.engines.teacher import TeacherEngine
    from megatron_trd.models import loading
    from megatron_trd.models.export import write_folder
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    current = platform.current()
    current.set_up()
    values: dict[str, Any] = {
        "model": model,
        "run_dir": run_dir,
        "student": {"distributed_optimizer": False},
        "teacher": {"weights": "ema", "ema_decay": DECAY, "tp": 2, "offload": True},
    }

    def tensors(source: loading.Source) -> dict[str, Tensor]:
        return {name: full.double() for name, full in loading.named_tensors(opened.arch, source)}

    with mock.patch.object(type(current), "dtype", torch.bfloat16):
        opened = open_model(model)
        student = StudentEngine(from_dict(values, "test"), opened, student_grid(1, 1, seed=0))
        teacher = TeacherEngine(student.config, student, opened)
        expected = tensors(opened.source)
        for _ in range(UPDATES):
            student._weights.settle()
            for parameter in student.model.parameters():
                parameter.data.mul_(1.01)
            now = tensors(student.source())
            expected = {name: DECAY * expected[name] + (1 - DECAY) * now[name] for name in expected}
            teacher.offload()
            teacher._memory.back()
            teacher.update()
        averages, weights = tensors(teacher.averages()), tensors(teacher.source())
        kept = loading.named_tensors(opened.arch, teacher.averages())
        write_folder(Path(run_dir, "ema"), opened.folder, opened.arch, kept, torch.float32)  # as a checkpoint does
        torch.distributed.barrier()
        teacher.load(open_model(Path(run_dir, "ema")).source)
        assert teacher.head is not None
        return {
            "error": max(float((averages[name] - expected[name]).norm() / expected[name].norm()) for name in expected),
            "moved": min(float((now[name] - averages[name]).norm() / now[name].norm()) for name in expected),
            # megatron-core's norms for a CPU are in float32 whatever the rest is
            "rounded": all(
                weights[name].equal(full.bfloat16().double() if full.dim() > 1 else full)
                for name, full in averages.items()
            ),
            "head": averages["lm_head.weight"].bfloat16().equal(teacher.head[: opened.arch.vocab_size]),
            "same after a checkpoint": all(map(torch.equal, averages.values(), tensors(teacher.averages()).values())),
        }


def test_an_average_of_16_bit_weights_is_kept_in_float32(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tie_word_embeddings=False)
    for found in run_ranks(follow, 2, str(model), str(tmp_path)):
        assert found["error"] < 1e-6
        assert found["moved"] == pytest.approx(0.11, abs=0.03), "it lags behind a student that grows by 1 % a step"
        assert found["rounded"], "the weights are the averages as bf16 has them"
        assert found["head"]
        assert found["same after a checkpoint"]
