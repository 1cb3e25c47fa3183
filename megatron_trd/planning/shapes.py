"""Shapes of models: read from a folder, or a published one if the folder is not on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_trd.errors import UserError
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.model import open_model

_DENSE = Architecture(
    family="Qwen3ForCausalLM",
    layers=0,
    hidden_size=0,
    ffn_size=0,
    heads=0,
    kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_positions=40960,
    tied=False,
    norm_eps=1e-6,
    rope_frequencies=(),  # not relevant here
)
_EXPERTS = replace(
    _DENSE, family="Qwen3MoeForCausalLM", kv_heads=4, experts=128, experts_per_token=8, normalised_routing=True
)
_4B = replace(_DENSE, layers=36, hidden_size=2560, ffn_size=9728, heads=32, tied=True)

# From each model's public config.json, by folder name. Tests compare them with the published parameter counts.
PUBLISHED = {
    "Qwen3-0.6B": replace(_DENSE, layers=28, hidden_size=1024, ffn_size=3072, heads=16, tied=True),
    "Qwen3-1.7B": replace(_DENSE, layers=28, hidden_size=2048, ffn_size=6144, heads=16, tied=True),
    "Qwen3-4B": _4B,
    "Qwen3-4B-Instruct-2507": replace(_4B, max_positions=262144),
    "Qwen3-8B": replace(_DENSE, layers=36, hidden_size=4096, ffn_size=12288, heads=32),
    "Qwen3-14B": replace(_DENSE, layers=40, hidden_size=5120, ffn_size=17408, heads=40),
    "Qwen3-32B": replace(_DENSE, layers=64, hidden_size=5120, ffn_size=25600, heads=64),
    "Qwen3-30B-A3B": replace(_EXPERTS, layers=48, hidden_size=2048, ffn_size=6144, heads=32, expert_ffn_size=768),
    "Qwen3-235B-A22B": replace(_EXPERTS, layers=94, hidden_size=4096, ffn_size=12288, heads=64, expert_ffn_size=1536),
}


def find_architecture(path: str, key: str) -> Architecture:
    """Architecture of the model that the setting `key` names. Raises `UserError` for an unknown model."""
    if not path:
        raise UserError(f"{key} is not set: give a model's folder ({key}=DIR), there or not, e.g. models/Qwen3-8B")
    if Path(path).exists():
        return open_model(path).arch
    name = Path(path).name
    if name not in PUBLISHED:
        raise UserError(
            f"{key}={path}: no such folder, and no shape is known of '{name}'; known: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]
