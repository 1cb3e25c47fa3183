"""Low-rank adapters at many layouts, against PEFT's: a step, what is sampled, and what is exported."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_trd.config import LoraConfig
from megatron_trd.models import loading, lora
from megatron_trd.models.weights import exported_slots
from tests.distributed import run_ranks
from tests.engines import reference, test_sampler
from tests.engines.test_numerics import (
    LR,
    WEIGHT_DECAY,
    compare_ranks,
    engines,
    full_tensors,
    layout,
    make_samples,
    prepare,
    take_step,
)
from tests.models import write_model
from tests.weights.test_gathering import in_pieces

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
            prepared = prepare(model, teacher, case)
        found = take_step(prepared, adapters)
        found["merged"] = full_tensors(prepared.student)
        results.append(found if rank == 0 else {"norm": found["norm"]})
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


SMALL = 40_000  # bytes a bucket: a layer takes several


def gather(rank: int, world: int, model: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Rank function: for each layout and way to gather, the merged weights and those without adapters, and whether the
    pieces of a tensor, put together, are the tensor."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    current = platform.current()
    current.set_up()
    found = []
    for case in cases:
        for peers in (current.peers, lambda *_: None):
            with mock.patch.object(lora, "fresh", filled), mock.patch.object(current, "peers", peers):
                student, _, *_ = prepare(model, None, case)
            student._weights.bucket_bytes = SMALL
            source = student.source()
            same = all(in_pieces(slot, source) for slot in exported_slots(student.arch))
            base = {
                name: full.clone() for name, full in loading.named_tensors(student.arch, student.source(adapted=False))
            }
            found.append((full_tensors(student), base, same))
            parallel_state.destroy_model_parallel()
    return found


def test_merged_weights_are_peft_s_at_every_layout_and_without_shared_memory(models: dict[str, Path]) -> None:
    cases = [adapted(2, 2), adapted(4, 1, micro_batch_size=1), adapted(1, 2)]
    model = write_model(models["untied"].parent / "four", num_key_value_heads=4, tie_word_embeddings=True)
    want = dict(with_peft(model).merge_and_unload().named_parameters())
    stored = load_file(model / "model.safetensors")
    for found in run_ranks(gather, 4, str(model), cases):
        for merged, base, same in found:
            assert same
            assert merged.keys() == base.keys() == want.keys()
            assert all(base[name].equal(stored[name]) for name in stored)
            for name, tensor in merged.items():
                assert torch.allclose(tensor.double(), want[name], atol=1e-6), name
                assert tensor.equal(stored[name]) == ("proj" not in name), name


DECAY = 0.75


def average(rank: int, world: int, model: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Rank function: for each layout, the merged weights and the teacher's averages after one update."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    platform.current().set_up()
    found = []
    for case in cases:
        case = case | {"teacher": case["teacher"] | {"ema_decay": DECAY}}
        with mock.patch.object(lora, "fresh", filled):
            student, teacher = engines(model, None, case)
        teacher.update()
        averages = {name: full.clone() for name, full in loading.named_tensors(student.arch, teacher.averages())}
        found.append((full_tensors(student), averages))
        parallel_state.destroy_model_parallel()
    return found


def test_an_average_is_that_of_merged_weights(models: dict[str, Path]) -> None:
    cases = [adapted(2, 1, "ema"), adapted(1, 2, "ema")]
    cases[0]["teacher"] |= {"tp": 1, "pp": 2}
    stored = load_file(models["untied"] / "model.safetensors")
    for found in run_ranks(average, 2, str(models["untied"]), cases):
        for merged, averages in found:
            for name, tensor in averages.items():
                assert torch.allclose(tensor, DECAY * stored[name] + (1 - DECAY) * merged[name], atol=1e-6), name
                assert tensor.equal(stored[name]) == ("proj" not in name), name


def sample_ranks(rank: int, world: int, model: str, student_settings: dict[str, Any], sampler_tp: int) -> Any:
    """Rank function: greedy trajectories of the student, and then of its frozen teacher, and whether every tensor in
    the engine is the trainer's."""
    from megatron_trd import platform
    from megatron_trd.engines import refit
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.sampler import Sampler
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.engines.teacher import TeacherEngine
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    config = test_sampler.make_config(model, student_settings, sampler_tp=sampler_tp, temperature=0.0)
    config = replace(config, lora=LoraConfig(rank=RANK, alpha=ALPHA))
    opened = open_model(model)
    with mock.patch.object(lora, "fresh", filled):
        student = StudentEngine(config, opened, student_grid(config.student.tp, config.student.pp, 1, seed=0))
    teacher = TeacherEngine(config, student, opened)
    engine = Engine(opened, config, max_length=320)
    found = []
    for source in (student.source, teacher.source):
        engine.refit(source())
        same = refit.verify(engine.llm, opened.arch, source())
        sampled = Sampler(config, engine, engine).sample(0, *test_sampler.ASKED)
        found.append((sampled, all(same.values())))
    return found


@pytest.mark.parametrize(
    ("ranks", "family", "settings", "sampler_tp", "tied"),
    [
        (4, "qwen3", {"tp": 2, "pp": 2}, 1, True),
        (4, "qwen3", {"tp": 2, "pp": 2}, 2, False),
        (2, "qwen3_moe", {"tp": 2, "sequence_parallel": True}, 1, False),
    ],
)
def test_the_sampler_has_the_merged_weights_and_the_teacher_s(
    tmp_path: Path, ranks: int, family: str, settings: dict[str, Any], sampler_tp: int, tied: bool
) -> None:
    model = write_model(tmp_path / "model", family=family, tie_word_embeddings=tied)
    merged = with_peft(model).merge_and_unload().float()
    merged.save_pretrained(tmp_path / "merged")
    for (rollouts, same), (refinements, same_as_teacher) in run_ranks(
        sample_ranks, ranks, str(model), settings, sampler_tp
    ):
        assert same
        assert same_as_teacher
        test_sampler.check_greedy(rollouts, tmp_path / "merged")
        test_sampler.check_greedy(refinements, model)


def begin(rank: int, world: int, model: str, case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rank function: a new student's adapters, and its merged weights."""
    from megatron_trd import platform

    platform.current().set_up()
    student, _ = engines(model, None, case)
    return adapters(student), full_tensors(student)


def test_a_student_begins_with_new_adapters_of_the_run_s_seed(models: dict[str, Path]) -> None:
    from megatron_trd.models.model import open_model

    stored = load_file(models["untied"] / "model.safetensors")
    slots = lora.all_adapter_slots(open_model(models["untied"]).arch, RANK)
    for found, merged in run_ranks(begin, 2, str(models["untied"]), adapted(2, 1) | {"seed": 3}):
        assert all(found[slot.hf[0]].equal(lora.fresh(3)(slot)[0]) for slot in slots)
        assert all(tensor.equal(stored[name]) for name, tensor in merged.items())


def test_a_new_adapter_changes_nothing_and_is_the_same_at_every_layout(models: dict[str, Path]) -> None:
    from megatron_trd.models.model import open_model

    arch = open_model(models["untied"]).arch
    for slot in lora.all_adapter_slots(arch, RANK):
        [first], [again], [other] = lora.fresh(1)(slot), lora.fresh(1)(slot), lora.fresh(2)(slot)
        assert first.shape == slot.shapes[0]
        assert first.equal(again)
        if "lora_B" in slot.hf[0]:
            assert not first.any()
        else:
            assert not first.equal(other)
            bound = first.shape[1] ** -0.5
            assert 0.9 * bound < first.abs().max() <= bound
    names = [slot.hf[0] for slot in lora.all_adapter_slots(arch, RANK)]
    assert (
        len({tuple(lora.fresh(1)(slot)[0].flatten()[:3].tolist()) for slot in lora.all_adapter_slots(arch, RANK)})
        > len(names) // 2
    )


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_small_adapters_survive_a_merge_in_float32(models: dict[str, Path], dtype: torch.dtype | None) -> None:
    """In bf16 the base weight comes back where they are less than half a step of it."""
    from megatron_trd.models.model import open_model

    opened = open_model(models["untied"])

    def base(slot: Any) -> list[Tensor]:
        return [tensor.bfloat16() for tensor in opened.source(slot)]

    def tiny(slot: Any) -> list[Tensor]:
        return [1e-2 * values(slot.hf[0], slot.shapes[0])]

    settings = LoraConfig(rank=RANK, alpha=ALPHA)
    source = lora.AdaptedSource(base, tiny, opened.arch, settings, dtype)
    for slot, pairs in lora.adapter_slots(opened.arch, RANK).items():
        for before, after, (a, b) in zip(base(slot), source(slot), pairs, strict=True):
            added = settings.scale * tiny(b)[0].double() @ tiny(a)[0].double()
            assert after.dtype == (dtype or torch.bfloat16)
            found = after.double() - before.double()
            if dtype:
                assert torch.allclose(found, added, rtol=0, atol=1e-7)
            else:
                assert (found == 0).float().mean() > 0.5
