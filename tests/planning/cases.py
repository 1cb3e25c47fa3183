"""What the planning tests share: a case on a cluster, from a few settings."""

from __future__ import annotations

from typing import Any

from megatron_trd.config import from_dict
from megatron_trd.planning.case import Case, make_case
from megatron_trd.planning.devices import CPU_EFFICIENCY, DEVICES, LOCAL_LAYERS, Cluster, Device
from megatron_trd.planning.workload import mean_lengths

# A rank on a CPU whose figures are given, not measured: what is tested must not depend on the machine's load.
CPU = Device("cpu", 8 * 2**30, 50e9, 10e9, 10e9, 10e9, LOCAL_LAYERS, CPU_EFFICIENCY)


def make(settings: dict[str, Any], *, gpu: str = "h100", nodes: int = 1, gpus_per_node: int = 8) -> Case:
    """A case of `settings`; the student is Qwen3-8B unless they say otherwise."""
    config = from_dict({"model": "models/Qwen3-8B"} | settings, "test")
    device = CPU if gpu == CPU.name else DEVICES[gpu]
    return make_case(config, Cluster(nodes, gpus_per_node, device), mean_lengths(config))
