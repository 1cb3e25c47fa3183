"""Low-rank adapters at many layouts, against PEFT's in float64."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_trd.models import lora
from tests.distributed import run_ranks
from tests.engines import reference
from tests.engines.test_numerics import LR, WEIGHT_DECAY, compare_ranks, full_tensors, layout, make_samples, prepare
from tests.models import write_model

RANK, ALPHA = 3, 5.0


def filled(seed: int) -> Any:
    """Adapters that change something, as `lora.fresh` does not; in the same way at every layout."""

    def make(slot: Any) -> list[Tensor]:
        return [values(slot.hf[0], slot.shapes[0])]

    return make


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_adapted(rank: int, world: int, model: str, teacher: str | None, cases: list[dict[str, Any]]) -> list[Any]:
    """Rank function: for each layout, the loss, the adapters' gradients, and the adapters and merged weights after one
    step, by name on disk; of ranks other than the first, the gradient's norm alone."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    platform.current().set_up()
    torch.set_num_threads(1)
    results = []
    for case in cases:
        with mock.patch.object(lora, "fresh", filled):
            student, teacher_engine, samples, share, hidden = prepare(model, teacher, case)
        sums = student.backward(samples, share, hidden, teacher_engine.head)
        loss = sums.result(grad_norm=0.0, lr=0.0).loss
        gradients = {}
        if not student.config.student.distributed_optimizer:
            trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.saved = parameter.data.clone()
                parameter.data.copy_(parameter.main_grad)
            gradients = adapters(student)
            for parameter in trained:
                parameter.data.copy_(parameter.saved)
        result = student.train_step(samples, share, hidden, teacher_engine.head)
        after, merged = adapters(student), full_tensors(student)
        whole = {"loss": loss, "grad": gradients, "after": after, "merged": merged} if rank == 0 else {}
        results.append(whole | {"norm": result.grad_norm})
        parallel_state.destroy_model_parallel()
    return results


def adapters(student: Any) -> dict[str, Tensor]:
    source = student._weights.source(student._adapters)
    found = {slot.hf[0]: source(slot)[0].clone() for slot in student._adapters}
    student._weights.settle()
    return found


def with_peft(folder: Path) -> Any:
    """The model with adapters of PEFT's, in float64, with the tests' values."""
    from peft import LoraConfig, get_peft_model

    from megatron_trd.models.model import open_model

    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=lora.targets(open_model(folder).arch))
    model = get_peft_model(reference.load(folder), settings)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(values(name, tuple(parameter.shape)))
    return model


def trained(model: Any) -> dict[str, Any]:
    """PEFT's trained parameters by the name a folder has them under."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def expected(folder: Path, teacher: Path | None, weights: str) -> dict[str, Any]:
    student = with_peft(folder)
    teach = {"frozen": reference.load(teacher or folder), "live": with_peft(folder)}[weights]
    loss = reference.step_loss(student, teach, make_samples())
    loss.backward()
    parameters = trained(student)
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
    torch.optim.AdamW(parameters.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY).step()
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    merged = reference.by_disk_name(dict(student.merge_and_unload().named_parameters()))
    return {"loss": loss.item(), "grad": gradients, "norm": norm.item(), "after": after, "merged": merged}


def adapted(tp: int, pp: int, weights: str = "frozen", **student: Any) -> dict[str, Any]:
    return layout(tp, pp, tp, pp, weights, **student) | {"lora": {"rank": RANK, "alpha": ALPHA}}


CASES = {
    1: [adapted(1, 1), adapted(1, 1, recompute=True), adapted(1, 1, distributed=True)],
    2: [
        adapted(2, 1),
        adapted(2, 1, sequence_parallel=True),
        adapted(2, 1, sequence_parallel=True, recompute=True, distributed_optimizer=True),
        adapted(1, 2, recompute=True),
        adapted(1, 1),
    ],
    4: [
        adapted(2, 2),
        adapted(2, 2, sequence_parallel=True, recompute=True),
        adapted(2, 1, sequence_parallel=True, distributed_optimizer=True),
    ],
}
EXPERT_CASES = {
    2: [adapted(2, 1, sequence_parallel=True, micro_batch_size=1), adapted(1, 1, ep=2, micro_batch_size=1)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": write_model(folder / "untied", seed=0),
        "tied": write_model(folder / "tied", seed=1, tie_word_embeddings=True),
        "large": write_model(folder / "large", seed=2, hidden_size=128),
        "qwen2": write_model(folder / "qwen2", family="qwen2", seed=4),
        "experts": write_model(folder / "experts", family="qwen3_moe", seed=5),
    }


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "world"),
    [
        ("untied", None, "frozen", 1),
        ("untied", None, "frozen", 2),
        ("tied", None, "frozen", 4),
        ("qwen2", None, "live", 2),
        ("untied", "large", "frozen", 2),
        ("experts", None, "frozen", 2),
    ],
)
def test_layouts_agree_with_peft_in_float64(
    models: dict[str, Path], student: str, teacher: str | None, weights: str, world: int
) -> None:
    cases = EXPERT_CASES[world] if student == "experts" else CASES[world]
    cases = [case | {"teacher": case["teacher"] | {"weights": weights}} for case in cases]
    other = models[teacher] if teacher else None
    found = run_ranks(run_adapted, world, str(models[student]), str(other) if other else None, cases)
    want = expected(models[student], other, weights)
    compare_ranks(found, want, cases)
    for case, result in zip(cases, found[0], strict=True):
        assert result["after"].keys() == want["after"].keys(), case
        assert result["merged"].keys() == want["merged"].keys(), case
        for name, tensor in result["merged"].items():
            assert torch.allclose(tensor.double(), want["merged"][name], atol=2e-5), (case, name)
