"""The GPU's passes in Triton's interpreter: alone against the CPU's in float64, and in whole losses. And compiled for
GPUs, as far as that goes without one: to their machine code, which nothing here can run."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.losses.kernels import Kernels
from megatron_trd.losses.objective import Objective
from megatron_trd.losses.torch_kernels import NO_LOGIT, TorchKernels
from tests.losses import cases, ranks, reference
from tests.losses.reference import Outcome

ROWS = 3
COLUMNS = [1, 5, 1003, 2 * 8192 + 17]  # fewer than a block, and several with a rest
CASES: dict[str, dict[str, Any]] = {
    "forward": {"divergence": "forward_kl"},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "jsd with little of the student": {"divergence": "jsd", "beta": 0.999},
    "warm": {"divergence": "forward_kl", "temperature": 2.0},
    "cold": {"divergence": "jsd", "temperature": 0.5},
}


def logits(kind: str, columns: int) -> tuple[Tensor, Tensor]:
    """`[ROWS, columns]` of both sides, with memory beyond their columns as a chunk of a padded shard has it."""
    generator = torch.Generator().manual_seed(columns)
    x, y = (3 * torch.randn(ROWS, columns + 3, generator=generator) for _ in range(2))
    if kind == "far from zero":
        x, y = x + 1e4, y - 1e4
    if kind == "rising":  # the maximum moves with every block
        x, y = x + torch.arange(columns + 3) / 100, y - torch.arange(columns + 3) / 100
    if kind == "masked" and columns > 1:
        x[:, 0], y[:, -5] = -torch.inf, -torch.inf
        x[0, : columns // 2] = -torch.inf
    x, y = x.clamp(min=NO_LOGIT), y.clamp(min=NO_LOGIT)  # as the losses hand them over
    return x[:, :columns], y[:, :columns]


def passes(kernels: Kernels) -> list[Tensor]:
    """What the passes give, with numbers for what other ranks would say."""
    statistics = kernels.statistics().clone()
    x_max, x_sum, y_max, y_sum, _ = statistics
    found = [x_max, x_sum.log(), y_max, y_sum.log(), statistics[4]]
    log_s, log_t = -x_sum.log() - 0.1, -y_sum.log() - 0.2
    factor = torch.linspace(0.5, 1.5, ROWS, dtype=x_max.dtype)
    if kernels.objective.divergence == "jsd":
        found += kernels.mixture(log_s, log_t).clone().unbind()
        terms = factor, torch.full_like(factor, -0.3)
    elif kernels.objective.divergence == "forward_kl":
        terms = factor * log_s.exp(), factor * log_t.exp()
    else:
        terms = factor * log_s.exp(), log_s - log_t - 0.3
    gradient = torch.empty_like(kernels.student, dtype=factor.dtype)
    kernels.gradient(*terms, gradient)
    return [*found, gradient]


def compare() -> list[str]:
    """In a process where the interpreter is on: what differs."""
    from megatron_trd.losses.triton_kernels import TritonKernels

    wrong = []
    kinds = ("plain", "far from zero", "rising", "masked")
    for (name, options), kind, columns in itertools.product(CASES.items(), kinds, COLUMNS):
        objective = Objective(**options)
        x, y = logits(kind, columns)
        found = passes(TritonKernels(x.clone(), y.clone(), objective))
        expected = passes(TorchKernels(x.double(), y.double(), objective))
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            error = (a.double() - b).abs().max().item()
            if not error <= 2e-6 * max(1.0, b.abs().max().item()):
                wrong.append(f"{name}, {kind}, {columns} columns: result {place} differs by {error}")
    for options, side in itertools.product(CASES.values(), (0, 1)):
        sides = logits("plain", 1003)
        sides[side][1, 7] = torch.nan
        *statistics, gradient = passes(TritonKernels(*sides, Objective(**options)))
        of_rows = torch.stack([*statistics, gradient.sum(dim=1)]).isnan().any(dim=0)
        if of_rows.tolist() != [False, True, False]:
            wrong.append(f"a logit that is NaN shows in rows {of_rows.tolist()}")
    x, y = logits("plain", 1003)
    kernels, ones = TritonKernels(x, y, Objective()), torch.ones(ROWS)
    kernels.statistics()
    halves = torch.empty_like(x, dtype=torch.bfloat16)
    kernels.gradient(ones, ones, halves)
    kernels.gradient(ones, ones, x)  # in place
    if (halves.float() - x).abs().gt(2**-7 * x.abs()).any():
        wrong.append("a gradient in bf16 is not the float32 one, rounded")
    return wrong


FUSED, ON_LOGITS = (
    [case for case in listed.values() if case.dtype == torch.float32 and case.top_k is None]
    for listed in (cases.for_fused(), cases.for_logits())
)


def whole_losses(rank: int, world: int, store: str) -> tuple[list[Outcome], list[Outcome]]:
    """In a process where the interpreter is on: both losses as on a GPU, whose tensors `kernels_for` looks for."""
    from megatron_trd.losses.triton_kernels import TritonKernels

    def as_on_a_gpu(student: Tensor, teacher: Tensor, objective: Objective) -> Kernels:
        if student.shape[1] == 0:
            return TorchKernels(student, teacher, objective)
        used.append(student.shape)
        return TritonKernels(student, teacher, objective)

    used: list[torch.Size] = []

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with mock.patch("megatron_trd.losses.rows.kernels_for", as_on_a_gpu):
        found = ranks.fused(rank, world, FUSED), ranks.on_logits(rank, world, ON_LOGITS)
    dist.barrier()
    assert len(used) >= len(FUSED) + len(ON_LOGITS) - 10, "few cases have no token, or no column here"
    return found


class _NoDriver:
    """What Triton asks about a GPU that is not here, to compile for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: int) -> list[tuple[str, str, str]]:
    """In a process of its own: every pass at the shapes of shards, compiled and not run. Its name, how it came to be,
    PTX, and what its machine code takes."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from megatron_trd.losses.triton_kernels import TritonKernels

    found = []

    def compile_only(function: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(function, *arguments, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            takes = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
        found.append((function.fn.__name__, kernel.asm["ptx"], takes))
        return kernel

    driver.set_active(_NoDriver(capability))
    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", compile_only):
        for rows, columns in [(512, 151_936 // 4), (1, 1), (3, 1003)]:  # those that are 1 or uneven are compiled apart
            for divergence in ("forward_kl", "reverse_kl", "jsd"):
                sides = torch.zeros(2, rows, columns)
                kernels = TritonKernels(*sides, Objective(divergence=divergence))
                kernels.statistics()
                ones = torch.ones(rows)
                if divergence == "jsd":
                    kernels.mixture(ones, ones)
                for dtype in (torch.float32, torch.bfloat16):
                    kernels.gradient(ones, ones, sides[0].to(dtype))
    return found


@pytest.mark.parametrize("capability", [80, 90, 100], ids=["A100", "H100", "B200"])
def test_the_passes_compile_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(compiled, capability).result()
    assert [name for name, *_ in found[:3]] == ["_statistics", "_gradient", "_gradient"]
    assert len(found) == 3 * (3 + 3 + 4)
    for place, (name, ptx, takes) in enumerate(found):
        [stack] = re.findall(r"STACK:(\d+)", takes)
        assert int(stack) <= 16, f"{name} keeps what should be in registers in memory"
        # Both sides are read in pieces of 16 bytes where rows begin at multiples of that.
        wide = len(re.findall(r"ld\.global\S*\.v4\.", ptx))
        assert wide >= 8 or place >= 10, name


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessPoolExecutor]:
    """Two processes whose Triton interprets. It decides when it is imported: they are not forked from one that has."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_triton_s_passes_are_torch_s(interpreted: ProcessPoolExecutor) -> None:
    assert interpreted.submit(compare).result() == []


def test_the_losses_on_triton_s_passes_equal_the_dense_reference(
    interpreted: ProcessPoolExecutor, tmp_path: Path
) -> None:
    jobs = [interpreted.submit(whole_losses, rank, 2, str(tmp_path / "store")) for rank in range(2)]
    fused, on_logits = zip(*(job.result() for job in jobs), strict=True)
    for number, case in enumerate(FUSED):
        reference.check_fused(case, [rank[number] for rank in fused])
        assert torch.equal(fused[0][number].per_token, fused[1][number].per_token)
    for number, case in enumerate(ON_LOGITS):
        reference.check_on_logits(case, [rank[number] for rank in on_logits])
