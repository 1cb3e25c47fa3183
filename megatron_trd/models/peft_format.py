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
from megatron_trd.errors import UserError, line_of
from megatron_trd.files import write_sums
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.folder import ADAPTER_CONFIG
from megatron_trd.models.lora import all_adapter_slots, targets
from megatron_trd.models.weights import Slot

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters, and of which model."""

    lora: LoraConfig
    base: str  # path or name of the model without them

    def write(self, folder: Path, arch: Architecture) -> None:
        """Write `adapter_config.json` into a folder."""
        alpha = self.lora.numerator
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
        (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> AdapterConfig | None:
    """What `AdapterConfig.write` wrote; None if there is none. Raises `UserError` if it is not readable."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lora = LoraConfig(rank=values["r"], alpha=values["lora_alpha"])  # whose error is a ValueError
        if not (lora.rank and lora.alpha):
            raise ValueError("r and lora_alpha have to be positive")
        return AdapterConfig(lora, str(values["base_model_name_or_path"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = line_of(error, 120)
        raise UserError(f"{path}: not a configuration of adapters ({reason}): copy the folder again") from None


def write_adapters(target: Path, config: AdapterConfig, arch: Architecture, adapter: Callable[[Slot], Tensor]) -> None:
    """Write a folder that PEFT, vLLM and `transformers` load; `adapter` gives a slot's whole tensor."""
    tensors = {slot.hf[0]: adapter(slot).contiguous() for slot in all_adapter_slots(arch, config.lora.rank)}
    (target / _WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))  # `save_file` makes files that others cannot read
    config.write(target, arch)
    write_sums(target)
