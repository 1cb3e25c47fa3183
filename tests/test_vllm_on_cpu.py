"""What a sampler on a CPU computes otherwise than vLLM's own default there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trd import platform
from tests.distributed import run_ranks
from tests.models import write_model


def norms(rank: int, world: int) -> dict[str, tuple[float, bool]]:
    """Rank function: by case, the largest difference to the operation written out, and whether the kernel took it."""
    from vllm import ir

    from megatron_trd import vllm_on_cpu

    platform.current().set_up()
    with vllm_on_cpu.starting("norms"), vllm_on_cpu.starting("norms again"):
        pass  # an engine that died is started a second time
    torch.manual_seed(0)
    queries = torch.randn(5, 3 * 4 * 32)[:, : 4 * 32].view(5, 4, 32)  # heads of a slice, as attention norms them
    found = {}
    for name, x in {"rows": torch.randn(7, 64), "heads": queries, "odd": torch.randn(3, 20)}.items():
        weight = torch.randn(x.shape[-1])
        plain, fused = (ir.ops.rms_norm.impls["cpp"], ir.ops.fused_add_rms_norm.impls["cpp"])
        if not plain.supports_args(x, weight, 1e-6):
            found[name] = 0.0, False
            continue
        error = (plain.impl_fn(x, weight, 1e-6) - written_out(x, weight)).abs().max().item()
        if x.is_contiguous():
            residual = torch.randn_like(x)
            total = x + residual
            normed, kept = fused.impl_fn(x.clone(), residual.clone(), weight, 1e-6)
            assert torch.equal(kept, total)
            error = max(error, (normed - written_out(total, weight)).abs().max().item())
        else:
            assert not fused.supports_args(x, x, weight, 1e-6)
        found[name] = error, True
    for other in (None, torch.ones(64, dtype=torch.bfloat16)):
        assert not ir.ops.rms_norm.impls["cpp"].supports_args(torch.randn(7, 64), other, 1e-6)
    return found


def written_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight.double()).float()


def preferred(rank: int, world: int, model: str) -> list[list[str]]:
    """Rank function: which implementations an engine prefers, the first that takes its arguments."""
    from megatron_trd.config import from_dict
    from megatron_trd.engines.engine import Engine
    from megatron_trd.models.model import open_model

    platform.current().set_up()
    Engine(open_model(model), from_dict({"model": model}, "test"), max_length=64)
    from vllm import ir

    return [ir.ops.rms_norm.get_priority(), ir.ops.fused_add_rms_norm.get_priority()]


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU build's kernels")


@on_cpu
def test_an_engine_uses_the_cpp_norms(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert run_ranks(preferred, 1, str(model)) == [[["cpp", "native"]] * 2]


@on_cpu
def test_the_cpp_norms_are_the_operation_and_refuse_what_they_cannot_do() -> None:
    (found,) = run_ranks(norms, 1)
    assert {name for name, (_, taken) in found.items() if taken} == {"rows", "heads"}
    assert all(error < 2e-6 for error, _ in found.values())
