"""Adapters on disk as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

A run's checkpoint has its adapters' configuration in the same form.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from megatron_trd.config import LoraConfig
from megatron_trd.errors import UserError
from megatron_trd.files import write_sums
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.lora import all_adapter_slots, targets
from megatron_trd.models.weights import Slot

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters, and of which model."""

    lora: LoraConfig
    base: str  # path or name of the model without them

    def write(self, folder: Path, arch: Architecture) -> None:
        """Write `adapter_config.json` into a folder."""
        alpha = self.lora.scale * self.lora.rank
        values: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.lora.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": targets(arch),
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> AdapterConfig | None:
    """What `AdapterConfig.write` wrote; None if there is none. Raises `UserError` if it is not readable."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, base = int(values["r"]), float(values["lora_alpha"]), str(values["base_model_name_or_path"])
        if min(rank, alpha) <= 0:
            raise ValueError("r and lora_alpha have to be positive")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a configuration of adapters ({error}): copy the folder again") from None
    return AdapterConfig(LoraConfig(rank=rank, alpha=alpha), base)


def write_adapters(target: Path, config: AdapterConfig, arch: Architecture, adapter: Callable[[Slot], Tensor]) -> None:
    """Write a folder that PEFT, vLLM and `transformers` load; `adapter` gives a slot's whole tensor."""
    tensors = {slot.hf[0]: adapter(slot).contiguous() for slot in all_adapter_slots(arch, config.lora.rank)}
    (target / _WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))  # `save_file` makes files that others cannot read
    config.write(target, arch)
    write_sums(target)
