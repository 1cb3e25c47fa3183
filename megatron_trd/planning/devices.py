"""Speed and memory of GPUs, from their vendors; the share that software reaches, measured where possible, else
assumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_trd.errors import UserError


@dataclass(frozen=True)
class Stack:
    """How the layers and the engine of a platform use memory (see megatron_trd/platform.py)."""

    device: str  # torch's name
    weight_bytes: int  # of a parameter
    optimizer_bytes: int  # of a parameter's optimizer state, including a float32 copy if the weights are narrower
    # Values that a layer keeps per token for backward, as multiples of the hidden size, the queries', the keys' and the
    # feed-forward's size, and the size of each expert that the token is sent to.
    kept_hidden: int
    kept_queries: int
    kept_keys: int
    kept_ffn: int
    kept_expert_ffn: int
    # Tiled attention keeps one number per head, and computes only the causal half of the products. Otherwise every pair
    # of positions is computed and kept.
    tiled_attention: bool
    # An engine has a share of the memory (`memory_fraction`), which it can release while Megatron works. Otherwise it
    # always has a fixed number of GiB for keys and values (`host_kv_cache_gib`).
    engine_shares: bool
    # Ranks read each other's weights in place, without buckets.
    sees_peers: bool = False
    engine_copies: int = 1  # of an engine's weights; 2: as they are, and packed for its kernels
    threads_communicate: bool = False  # as `Platform` says


# Two norms keep their input and output; the feed-forward keeps gate and up in one, and their product. This much was
# measured (tests/engines/test_transformer_engine.py). A query is kept in the fused product, reshaped, rotated, and as
# the attention's output; keys and values in the fused product, rotated, and in order: read from megatron-core 0.16 and
# transformer-engine 2.
TRANSFORMER_ENGINE = Stack(
    "cuda",
    weight_bytes=2,
    optimizer_bytes=12,
    kept_hidden=4,
    kept_queries=4,
    kept_keys=4,
    kept_ffn=3,
    kept_expert_ffn=3,
    tiled_attention=True,
    engine_shares=True,
)
# Measured with `saved_tensors_hooks` on megatron-core's local layers: tests/planning/test_sizes.py. Unfused, the gate's
# activation and "up + 0" are kept too, and an expert's output before its weight.
LOCAL_LAYERS = Stack(
    "cpu",
    weight_bytes=4,
    optimizer_bytes=8,
    kept_hidden=6,
    kept_queries=7,
    kept_keys=4,
    kept_ffn=5,
    kept_expert_ffn=6,
    tiled_attention=False,
    engine_shares=False,
    sees_peers=True,
    engine_copies=2,
    threads_communicate=True,
)


@dataclass(frozen=True)
class Efficiency:
    """Shares of a peak that are reached, and costs that do not depend on a peak."""

    training: float  # of peak FLOP/s, forward and backward of a layer
    forward: float  # of peak FLOP/s, teacher and prompts
    head: float  # of peak FLOP/s, the loss: four long products and the passes between them
    decoding: float  # of memory bandwidth, reading weights, keys and values
    copying: float  # of memory bandwidth, optimizer and refit
    link: float  # of a link's bandwidth, collectives
    collective_seconds: float  # latency of one small collective inside a node
    engine_seconds: float  # of the host, each step of an engine
    layer_seconds: float  # of the host, one layer of a micro-batch, forward
    tensor_seconds: float  # of the host, one tensor of a refit
    context_gib: float  # of a process before it has any tensor, and allocator losses
    graphs_gib: float  # captured graphs of an engine, which sleep does not free
    engine_tokens: int  # of prompts in one pass of an engine


GPU_EFFICIENCY = Efficiency(
    training=0.40,  # assumed; Megatron-LM's README reports 0.41 to 0.47 on H100, with overlap that is not used here
    forward=0.45,  # assumed: as training, without the bandwidth-bound half of a step
    head=0.57,  # measured, 72 ms on an H100 at its power limit (benchmarks/results/loss_h100.md); assumed elsewhere
    decoding=0.65,  # assumed
    copying=0.70,  # assumed
    link=0.70,  # assumed: the share of a link that nccl-tests reaches at hundreds of megabytes
    collective_seconds=20e-6,  # assumed
    engine_seconds=3e-3,  # assumed: scheduling, and sampling with a generator for each request
    layer_seconds=0.3e-3,  # assumed: a few dozen kernel launches
    tensor_seconds=100e-6,  # seen on an H100: 0.12 ms, before q, k and v took one copy each (refit_h100.md)
    context_gib=4.0,  # assumed: CUDA context 0.5, NCCL's buffers 1 to 2, work spaces, fragments
    graphs_gib=0.75,  # assumed; vLLM prints it when it starts
    engine_tokens=16384,  # vLLM 0.32's default for `LLM` on cards of 70 GiB and more (arg_utils.py)
)

# Fitted to the embedded demo at TP 1 on two cores; docs/scaling.md compares them with other runs.
CPU_EFFICIENCY = Efficiency(
    training=0.35,
    forward=0.35,
    head=0.75,  # 1 / 1.17 of the products alone (benchmarks/results/loss_cpu.md), which have 0.9 of the peak
    decoding=0.60,
    copying=0.60,
    link=0.25,  # gloo over the machine's own network
    collective_seconds=0.3e-3,
    engine_seconds=5e-3,
    layer_seconds=1.5e-3,
    tensor_seconds=0.5e-3,
    context_gib=0.9,  # resident after importing torch, megatron-core and vLLM
    graphs_gib=0.0,  # none are captured
    engine_tokens=4096,  # megatron_trd/platform.py
)


@dataclass(frozen=True)
class Device:
    """One GPU, or one rank's share of a machine without GPUs."""

    name: str
    memory: float  # bytes
    flops: float  # peak FLOP/s of dense products in the training precision
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another GPU of the node, one way
    network: float  # bytes/s to another node, one way, for one GPU's share
    stack: Stack = TRANSFORMER_ENGINE
    efficiency: Efficiency = GPU_EFFICIENCY


# Memory is the total that CUDA reports, which is not the vendor's round number. The rest is from the vendor: peak
# FLOP/s of bf16 without sparsity, half of NVLink's two-way bandwidth, and the network of the vendor's own 8-GPU node.
DEVICES = {
    device.name: device
    for device in (
        # H100 SXM5 data sheet: 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s. DGX H100: 8 x 400 Gb/s.
        Device("h100", 79.1 * 2**30, 989e12, 3.35e12, 450e9, 50e9),
        # H200 SXM data sheet: 989 TFLOP/s, 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200: 8 x 400 Gb/s.
        Device("h200", 139.8 * 2**30, 989e12, 4.8e12, 450e9, 50e9),
        # A100 80GB SXM data sheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s. DGX A100: 8 x 200 Gb/s.
        Device("a100-80g", 79.1 * 2**30, 312e12, 2.039e12, 300e9, 25e9),
        # HGX B200 data sheet, an eighth: 2.25 PFLOP/s, 180 GB, 7.7 TB/s, NVLink 1.8 TB/s. DGX B200: 8 x 400 Gb/s.
        Device("b200", 178.3 * 2**30, 2250e12, 7.7e12, 900e9, 50e9),
    )
}
CPU = "cpu"


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    device: Device

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def link(self, stride: int, size: int) -> float:
        """Bytes/s of a collective over `size` ranks, `stride` apart: the network's if they span nodes."""
        inside = stride * size <= self.gpus_per_node
        return self.device.efficiency.link * (self.device.link if inside else self.device.network)


def find_cluster(gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """The cluster of the command line. Raises `UserError` for a GPU that is not in the table."""
    if nodes < 1 or gpus_per_node < 1:
        raise UserError(f"--nodes {nodes} --gpus-per-node {gpus_per_node}: both must be at least 1")
    gpu = gpu.lower()
    if gpu == CPU:
        if nodes > 1:
            raise UserError(f"--gpu {CPU} is this machine: --nodes must be 1, --gpus-per-node its ranks")
        return Cluster(1, gpus_per_node, measure_cpu(gpus_per_node))
    if gpu not in DEVICES:
        raise UserError(f"--gpu {gpu} is not known; known: {', '.join([*DEVICES, CPU])}")
    return Cluster(nodes, gpus_per_node, DEVICES[gpu])


def measure_cpu(ranks: int) -> Device:
    """This machine as `ranks` equal devices: float32 products and copies, measured now for a second or two."""
    import torch

    size = 768
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    flops = 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product), 100)
    source = torch.ones(2**26)  # 256 MiB: larger than any cache
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), 10)  # read and written
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    each = copied / ranks
    return Device(CPU, memory / ranks, flops / ranks, each, each, each, LOCAL_LAYERS, CPU_EFFICIENCY)


def _best_seconds(work: Callable[[], object], times: int) -> float:
    """The best of many short runs shows what the machine can do, even while other processes use it."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
