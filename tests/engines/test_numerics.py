"""Loss, gradients and one optimizer step at many layouts against a dense float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_trd.config import TrainConfig, from_dict
from megatron_trd.data.batching import Sample, deal, normalize
from megatron_trd.errors import UserError
from tests.distributed import run_ranks
from tests.engines import reference
from tests.models import VOCAB

LR, WEIGHT_DECAY = 1e-3, 0.1


def make_samples(count: int = 5) -> list[Sample]:
    """Samples of unlike lengths, odd in number, whose two prompts differ."""
    random = np.random.default_rng(3)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(2, VOCAB, random.integers(low, high)))

    made = []
    for _ in range(count):
        response = ids(3, 20)
        made.append(Sample(ids(2, 12), ids(5, 30), response, (0.0,) * len(response)))
    return normalize(made, "sequence")


def make_config(model: str, **values: Any) -> TrainConfig:
    base = {
        "model": model,
        "steps": 10,
        "optimizer": {
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "clip_grad": 0.5,
            "warmup_fraction": 0.0,
            "schedule": "constant",
        },
    }
    return from_dict(base | values, "test")


class Prepared(NamedTuple):
    """What a training step of one layout takes, on this rank."""

    student: Any
    teacher: Any
    samples: list[Sample]
    share: list[int]
    hidden: Any


def engines(model: str, teacher_model: str | None, case: dict[str, Any]) -> tuple[Any, Any]:
    """Student and teacher of one layout."""
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.engines.teacher import TeacherEngine
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    settings = case | {"teacher": case["teacher"] | {"model": teacher_model}}
    config = make_config(model, **settings)
    grid = student_grid(config.student.tp, config.student.pp, config.student.ep, seed=0)
    student = StudentEngine(config, open_model(model), grid)
    return student, TeacherEngine(config, student, open_model(teacher_model or model))


def prepare(model: str, teacher_model: str | None, case: dict[str, Any]) -> Prepared:
    student, teacher = engines(model, teacher_model, case)
    samples = make_samples()
    shares = deal(samples, student.grid.layout.dp, cost=lambda sample: len(sample.tokens("student")))
    return Prepared(student, teacher, samples, shares[student.grid.dp_rank], teacher.hidden(samples, shares))


def run_layouts(rank: int, world: int, model: str, teacher_model: str | None, cases: list[dict[str, Any]]) -> list[Any]:
    """Rank function: for each layout, the loss, the gradients and the parameters after one step, by HF name; of ranks
    other than the first, the gradient's norm alone."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    platform.current().set_up()
    torch.set_num_threads(1)
    results = []
    for case in cases:
        found = take_step(prepare(model, teacher_model, case), full_tensors)
        results.append(found if rank == 0 else {"norm": found["norm"]})
        parallel_state.destroy_model_parallel()
    return results


def take_step(prepared: Prepared, read: Callable[[Any], dict[str, Tensor]]) -> dict[str, Any]:
    """The loss, the gradient's norm, and by `read`, which gives all that is trained, the gradients (unless they are
    distributed) and what is there after one step."""
    student, teacher, samples, share, hidden = prepared
    sums = student.backward(samples, share, hidden, teacher.head)
    loss = sums.result(grad_norm=0.0, lr=0.0).loss
    gradients = {}
    if not student.config.student.distributed_optimizer:
        trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.saved = parameter.data.clone()
            parameter.data.copy_(parameter.main_grad)
        gradients = read(student)
        for parameter in trained:
            parameter.data.copy_(parameter.saved)
    norm = student.train_step(samples, share, hidden, teacher.head).grad_norm
    return {"loss": loss, "grad": gradients, "after": read(student), "norm": norm}


def full_tensors(student: Any) -> dict[str, Tensor]:
    from megatron_trd.models import loading

    found = {name: full.clone().cpu() for name, full in loading.named_tensors(student.arch, student.source())}
    student._weights.settle()  # which train_step does before it changes weights; here the test itself does
    return found


def expected(
    model: Path, teacher: Path, divergence: Callable[[Tensor, Tensor], Tensor] = reference.forward_kl
) -> dict[str, Any]:
    student, teach = reference.load(model), reference.load(teacher)
    loss = reference.step_loss(student, teach, make_samples(), divergence)
    loss.backward()
    gradients = reference.by_disk_name({name: p.grad.clone() for name, p in student.named_parameters()})
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
    decayed = [p for p in student.parameters() if p.dim() > 1]
    plain = [p for p in student.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8).step()
    after = reference.by_disk_name({name: parameter.detach() for name, parameter in student.named_parameters()})
    return {"loss": loss.item(), "grad": gradients, "norm": norm.item(), "after": after}


def layout(
    tp: int, pp: int, ttp: int, tpp: int, weights: str = "frozen", distributed: bool = False, **student: Any
) -> dict[str, Any]:
    student = {"tp": tp, "pp": pp, "micro_batch_size": 2, "distributed_optimizer": distributed} | student
    return {
        "student": student,
        "teacher": {"tp": ttp, "pp": tpp, "micro_batch_size": 2, "weights": weights},
    }


def expert_layout(tp: int, pp: int, ep: int, tep: int, **student: Any) -> dict[str, Any]:
    """A student and a teacher with experts; tensor parallelism comes with sequence parallelism, as it must."""
    settings = {"tp": tp, "pp": pp, "ep": ep, "sequence_parallel": tp > 1, "distributed_optimizer": False} | student
    return {"student": settings, "teacher": {"tp": tp, "pp": 1, "ep": tep, "weights": "frozen"}}


CASES = {
    1: [layout(1, 1, 1, 1), layout(1, 1, 1, 1, "live"), layout(1, 1, 1, 1, distributed=True)],
    2: [
        layout(2, 1, 1, 1),
        layout(2, 1, 1, 2),
        layout(2, 1, 2, 1, "live"),
        layout(2, 1, 1, 1, recompute=True),
        layout(2, 1, 1, 1, sequence_parallel=True),
        layout(2, 1, 2, 1, "live", sequence_parallel=True, recompute=True),
        layout(1, 2, 2, 1),
        layout(1, 2, 1, 2, "live"),
        layout(1, 1, 2, 1),
        layout(1, 1, 1, 2, distributed=True),
    ],
    4: [
        layout(2, 2, 1, 1),
        layout(2, 2, 2, 1),
        layout(2, 2, 2, 2, "live"),
        layout(2, 1, 1, 2),
        layout(2, 1, 2, 2, distributed=True),
        layout(1, 4, 1, 4),
        layout(1, 2, 2, 2, distributed=True),
    ],
}


EXPERT_CASES = {
    1: [expert_layout(1, 1, 1, 1)],
    2: [
        expert_layout(1, 1, 2, 2),  # samples are odd in number: one rank has an idle micro-batch
        expert_layout(2, 1, 1, 1),
        expert_layout(2, 1, 2, 2),
        expert_layout(1, 2, 1, 2, micro_batch_size=2),
        expert_layout(1, 1, 2, 1, distributed_optimizer=True),
        expert_layout(2, 1, 1, 2, distributed_optimizer=True),
    ],
    4: [expert_layout(2, 1, 4, 2, recompute=True), expert_layout(2, 2, 2, 4), expert_layout(1, 2, 2, 4)],
}


def compare(found: dict[str, Any], want: dict[str, Any], case: object) -> None:
    assert found["loss"] == pytest.approx(want["loss"], rel=2e-6), case
    assert found["norm"] == pytest.approx(want["norm"], rel=1e-5), case
    for name, gradient in found["grad"].items():
        reference_gradient = want["grad"][name]
        error = (gradient.double() - reference_gradient).norm() / reference_gradient.norm()
        assert error < 1e-5, (case, name, error)
    assert found["after"].keys() <= want["after"].keys()
    for name, parameter in found["after"].items():
        # AdamW's first step is lr * sign(gradient) where the gradient is not tiny: compare where it is not
        moved = want["grad"][name].abs() > 1e-6
        assert torch.allclose(parameter.double()[moved], want["after"][name][moved], atol=2e-3 * LR), (case, name)


def compare_in_bf16(found: dict[str, Any], want: dict[str, Any], family: str) -> None:
    assert found["loss"] == pytest.approx(want["loss"], rel=5e-3)
    assert found["norm"] == pytest.approx(want["norm"], rel=2e-2)
    for name, gradient in found["grad"].items() if family != "qwen3_moe" else ():  # rounded routers choose others
        error = (gradient.double() - want["grad"][name]).norm() / want["grad"][name].norm()
        assert error < 0.05, (name, error)


def compare_ranks(found: list[list[dict[str, Any]]], want: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """What `run_layouts` gave on every rank."""
    for case, *results in zip(cases, *found, strict=True):
        compare(results[0], want, case)
        assert len({result["norm"] for result in results}) == 1, "all ranks clip by the same norm"


@pytest.mark.parametrize(
    ("student", "teacher", "world"),
    [
        ("untied", None, 1),
        ("untied", None, 2),
        ("untied", None, 4),
        ("tied", None, 2),
        ("tied", "large", 4),
        ("llama", None, 2),
        ("qwen2", None, 2),
        ("experts", None, 1),
        ("experts", None, 2),
        ("experts", None, 4),
    ],
)
def test_layouts_agree_with_dense_float64(
    models: dict[str, Path], student: str, teacher: str | None, world: int
) -> None:
    cases = EXPERT_CASES[world] if student == "experts" else CASES[world]
    if teacher:
        cases = [case for case in cases if case["teacher"]["weights"] != "live"]
    path = str(models[teacher]) if teacher else None
    found = run_ranks(run_layouts, world, str(models[student]), path, cases)
    want = expected(models[student], models[teacher or student])
    compare_ranks(found, want, cases)


def run_padded(rank: int, world: int, *arguments: Any) -> list[Any]:
    """Rank function: `run_layouts` with sequences padded as for a GPU: to a multiple, far above the longest here."""
    from megatron_trd import platform

    with mock.patch.object(type(platform.current()), "length_multiple", 48):
        return run_layouts(rank, world, *arguments)


def test_padding_to_a_multiple_changes_nothing(models: dict[str, Path]) -> None:
    cases = [layout(2, 1, 2, 1, "live", sequence_parallel=True), layout(1, 2, 2, 1)]
    found = run_ranks(run_padded, 2, str(models["untied"]), None, cases)[0]
    want = expected(models["untied"], models["untied"])
    for case, result in zip(cases, found, strict=True):
        compare(result, want, case)


BETA, CLIP, TOP_K = 0.3, 2.0, 7
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "opsd-forward-kl-clip": lambda teacher, student: reference.forward_kl(teacher, student).clamp(max=CLIP),
    "opsd-reverse-kl": reference.reverse_kl,
    "opsd-reverse-kl-topk": lambda teacher, student: reference.reverse_kl(*reference.top_k(teacher, student, TOP_K)),
    "opsd-jsd": lambda teacher, student: reference.jsd(teacher, student, BETA),
}


def test_every_divergence_of_the_methods_agrees_with_dense_float64(models: dict[str, Path]) -> None:
    numbers = {"beta": BETA, "clip": CLIP, "top_k": TOP_K, "chunk_tokens": 7}
    cases = [layout(2, 1, 1, 1) | {"method": method, "loss": numbers} for method in DIVERGENCES]
    found = run_ranks(run_layouts, 2, str(models["untied"]), str(models["large"]), cases)[0]
    for (method, divergence), result in zip(DIVERGENCES.items(), found, strict=True):
        compare(result, expected(models["untied"], models["large"], divergence), method)


def test_a_mean_over_all_tokens_is_an_option(models: dict[str, Path]) -> None:
    sequence, token = (normalize(make_samples(), by) for by in ("sequence", "token"))
    assert sum(sample.weight * len(sample.response) for sample in token) == pytest.approx(1)
    assert len({sample.weight for sample in token}) == 1
    assert len({sample.weight for sample in sequence}) > 1


def rates(rank: int, world: int, model: str, schedule: str, steps: int) -> list[float]:
    """Rank function: the learning rate that each step of a run is taken with."""
    from megatron_trd import platform
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    optimizer = {"lr": 1.0, "schedule": schedule, "warmup_fraction": 0.25, "min_lr_ratio": 0.1}
    config = make_config(model, steps=steps, optimizer=optimizer)
    student = StudentEngine(config, open_model(model), student_grid(1, 1, seed=0))
    found = []
    for _ in range(steps):
        found.append(student.optimizer.param_groups[0]["lr"])
        student.scheduler.step(increment=1)
    return found


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_warms_up_and_then_keeps_or_falls(models: dict[str, Path], schedule: str) -> None:
    warm, decay = 2, 6  # of 8 steps
    after = np.arange(1, decay + 1)
    falling = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * after / (decay + 1)))
    expected_rates = [0.5, 1.0, *(falling if schedule == "cosine" else np.ones(decay))]
    assert run_ranks(rates, 1, str(models["untied"]), schedule, warm + decay)[0] == pytest.approx(expected_rates)


ADAM: dict[str, Any] = {"beta1": 0.6, "beta2": 0.7, "warmup_fraction": 0.0, "schedule": "cosine", "min_lr_ratio": 0.1}


def take_steps(rank: int, world: int, model: str, teacher: str, steps: int) -> dict[str, Tensor]:
    """Rank function: the student's parameters after some optimizer steps on the same samples."""
    from megatron_trd import platform
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.engines.teacher import TeacherEngine
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    optimizer = make_config(model).optimizer
    values = {"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_grad": optimizer.clip_grad} | ADAM
    # half as many steps of a run, each on two epochs of its samples
    config = make_config(model, steps=steps // 2, epochs_per_batch=2, optimizer=values, teacher={"model": teacher})
    student = StudentEngine(config, open_model(model), student_grid(1, 1, seed=0))
    teacher_engine = TeacherEngine(config, student, open_model(teacher))
    samples = make_samples()
    everything = list(range(len(samples)))
    for _ in range(steps):
        student.train_step(samples, everything, teacher_engine.hidden(samples, [everything]), teacher_engine.head)
    return full_tensors(student)


def test_several_steps_are_adamw_s_with_a_falling_rate(models: dict[str, Path]) -> None:
    steps = 4
    found = run_ranks(take_steps, 1, str(models["untied"]), str(models["large"]), steps)[0]
    student, teacher = reference.load(models["untied"]), reference.load(models["large"])
    before = reference.by_disk_name(
        {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    )
    groups = [
        {"params": [p for p in student.parameters() if (p.dim() > 1) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(ADAM["beta1"], ADAM["beta2"]), eps=1e-8)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / (steps + 1))))
        optimizer.zero_grad()
        reference.step_loss(student, teacher, make_samples(), reference.forward_kl).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
    after = reference.by_disk_name({name: parameter.detach() for name, parameter in student.named_parameters()})
    for name, parameter in found.items():
        moved = after[name] - before[name]
        error = (parameter.double() - after[name]).norm() / moved.norm()
        assert error < 1e-2, (name, float(error))


def compared_tokens(rank: int, world: int, model: str, bounds: list[int]) -> list[tuple[float, int]]:
    """Rank function: for each `log.drift_tokens`, the tokens compared in a step, and those of its first micro-batch."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    platform.current().set_up()
    found = []
    for bound in bounds:
        case = layout(1, 1, 1, 1) | {"log": {"drift_tokens": bound}}
        student, teacher, samples, share, hidden = prepare(model, None, case)
        sums = student.backward(samples, share, hidden, teacher.head)
        first = sorted(share, key=lambda sample: len(samples[sample].tokens("student")))[-2:]
        found.append((sums.totals[4].item(), sum(len(samples[sample].response) for sample in first)))
        parallel_state.destroy_model_parallel()
    return found


def test_drift_is_of_so_many_tokens_of_the_first_micro_batch(models: dict[str, Path]) -> None:
    [(none, _), (three, _), (all_there_are, first)] = run_ranks(compared_tokens, 1, str(models["tied"]), [0, 3, 999])[0]
    assert (none, three) == (0, 3)
    assert all_there_are == first


def unclipped(rank: int, world: int, model: str, chunk_tokens: int) -> tuple[float, set[int], str]:
    """Rank function: without clipping, the gradient's norm and the tokens that a chunk of the loss may have; and what a
    step says whose gradient is not finite."""
    from megatron_trd import platform
    from megatron_trd.engines import student as module

    platform.current().set_up()
    settings = {"optimizer": {"lr": LR, "clip_grad": 0.0}, "loss": {"chunk_tokens": chunk_tokens}}
    student, teacher, samples, share, hidden = prepare(model, None, layout(1, 1, 1, 1) | settings)
    with mock.patch.object(module, "fused_linear_divergence", wraps=module.fused_linear_divergence) as loss:
        norm = student.train_step(samples, share, hidden, teacher.head).grad_norm
    chunks = {call.kwargs["chunk_tokens"] for call in loss.call_args_list}
    broken = {index: torch.full_like(states, torch.nan) for index, states in hidden.items()}
    with pytest.raises(UserError) as refused:
        student.train_step(samples, share, broken, teacher.head)
    return norm, chunks, str(refused.value)


def test_a_gradient_is_measured_where_it_is_not_clipped_and_has_to_be_finite(models: dict[str, Path]) -> None:
    [(norm, chunks, said)] = run_ranks(unclipped, 1, str(models["untied"]), 7)
    assert norm == pytest.approx(expected(models["untied"], models["untied"])["norm"], rel=1e-5)
    assert chunks == {7}, "as loss.chunk_tokens says"
    assert "the gradient is not finite" in said
