"""Bandwidth and memory of a refit: Megatron shards into running vLLM engines, beside a plain copy of the same bytes.

    python -m benchmarks.refit --write benchmarks/results/refit_cpu.md
    python -m benchmarks.refit --tp 1 --pp 1 --write benchmarks/results/refit_h100.md  # on one GPU

A student of random weights lies over the ranks at `--tp` x `--pp`; every rank has an engine, or two ranks share one.
Each row is done by all ranks at once, `--repeats` times after one to warm up, and counts until the last has ended; GB/s
are those of one rank, of the bytes that its engine ends up with.

- *plain copy*: as many bytes, from touched memory to touched memory, of the device;
- *vLLM's loading*: its own `reload_weights`, of Hugging Face tensors that a rank has already;
- *refit*: as in training, from where the student's ranks have their shards.

Memory is the peak of a rank above what it held before its first refit (`VmHWM` on a CPU, what torch has allocated on a
GPU); on a CPU the shards of all ranks lie in shared memory since the student was made.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import held_bytes, machine, on_a, peak_bytes, publish
from megatron_trd import platform
from megatron_trd.config import SamplerConfig
from tests.distributed import run_ranks
from tests.models import write_model

COPIED = 256 * 2**20  # bytes of a plain copy at once, repeated; far more than a cache holds
COPY, LOADING, REFIT = "plain copy", "vLLM's loading", "refit"
# 0.52 billion parameters; four ranks' engines with a vocabulary of 151,936 at this size do not fit in 24 GB
SHAPE: dict[str, Any] = {
    "hidden_size": 1280,
    "num_hidden_layers": 22,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}


def measure(rank: int, world: int, folder: str, sampler_tp: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rank function: seconds of each row, and bytes."""
    from megatron_trd.config import from_dict
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.models.loading import named_tensors
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    current = platform.current()
    current.set_up()
    opened = open_model(folder)
    arch, grid, repeats = opened.arch, student_grid(options.tp, options.pp, seed=0), options.repeats
    sampler = {"tp": sampler_tp, "refit_bucket_mib": options.bucket_mib, "enforce_eager": True}  # nothing is sampled
    layout = {"tp": options.tp, "pp": options.pp}
    values = {"model": folder, "student": layout, "sampler": sampler, "lora": {"rank": options.lora_rank}}
    config = from_dict(values, "benchmark")
    student = StudentEngine(config, opened, grid)
    current.release_memory()
    engine = Engine(opened, config, max_length=64)
    sent = 0

    def whole() -> None:
        nonlocal sent
        sent = engine.refit(student.source())

    @functools.cache
    def ones(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=current.dtype, device=current.device)

    def present(slot: Any) -> list[Tensor]:
        return [ones(tuple(shape)) for shape in slot.shapes]

    @torch.no_grad()
    def load() -> None:
        how = {"weights_iterator": named_tensors(arch, present), "is_checkpoint_format": True}
        engine.llm.collective_rpc("reload_weights", kwargs=how)

    current.release_memory()  # left by loading
    before = held_bytes(current.device.type)
    whole()
    memory = peak_bytes(current.device.type) - before
    copied = sent // sampler_tp
    seconds = {
        COPY: _copy(copied, repeats),
        LOADING: _timed(load, repeats),
        REFIT: _timed(whole, repeats),
    }
    return {"seconds": seconds, "bytes": copied, "memory": memory, "different": len(_check(engine, student))}


def _copy(size: int, repeats: int) -> float:
    here, there = (torch.ones(COPIED, dtype=torch.uint8, device=platform.current().device) for _ in range(2))

    def copy() -> None:
        for begin in range(0, size, COPIED):
            there[: size - begin].copy_(here[: size - begin])

    return _timed(copy, repeats)


def _check(engine: Any, student: Any) -> list[str]:
    from megatron_trd.engines import refit

    same = refit.verify(engine.llm, engine.model.arch, student.source())
    return [name for name, equal in same.items() if not equal]


def _timed(step: Callable[[], Any], repeats: int) -> float:
    """Median seconds until the slowest rank is done."""
    step()
    current, times = platform.current(), []
    for _ in range(repeats):
        current.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        step()
        current.synchronize()
        slowest = torch.tensor(time.perf_counter() - begin, device=current.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(slowest.item())
    return median(times)


def _rows(folder: str, options: argparse.Namespace) -> Iterator[str]:
    world, backend = options.tp * options.pp, platform.current().backend
    for sampler_tp in (1, 2)[:world]:
        [first, *_] = ranks = run_ranks(measure, world, folder, sampler_tp, options, timeout=1800, backend=backend)
        if any(found["different"] for found in ranks):
            raise SystemExit("the refit check found other weights in an engine")
        seconds, copied = first["seconds"], first["bytes"]
        for name, value in seconds.items():
            memory = f"{max(found['memory'] for found in ranks) / 2**20:,.0f}" if name == REFIT else ""
            yield (
                f"| {sampler_tp} | {name} | {value:.3g} | {copied / 1e9 / value:,.3g} | "
                f"{seconds[COPY] / value:.2f} | {seconds[LOADING] / value:.2f} | {memory} |"
            )


def main() -> None:
    """Measure, print the table, and write it if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="of the student")
    parser.add_argument("--pp", type=int, default=2, help="of the student")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=SamplerConfig.refit_bucket_mib)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--lora-rank", type=int, default=0, help="of the student's adapters, which are merged")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options, device = parser.parse_args(), platform.current().device.type
    with tempfile.TemporaryDirectory(prefix="refit-") as folder:
        dtype = platform.current().dtype
        write_model(Path(folder), dtype=dtype, **SHAPE | {"num_hidden_layers": options.layers})
        parameters = Path(folder, "model.safetensors").stat().st_size / dtype.itemsize / 1e9
        rows = list(_rows(folder, options))
    text = "\n".join(
        [
            f"{machine(device)}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {parameters:.2f} "
            f"billion parameters, {options.tp * options.pp} ranks at TP {options.tp} x PP {options.pp}"
            f"{f', adapters of rank {options.lora_rank}' if options.lora_rank else ''}; median of "
            f"{options.repeats}. Every tensor of every engine was compared with the student's by checksum after the "
            "last refit.\n",
            "| sampler TP | | s | GB/s a rank | of a plain copy | of vLLM's loading | memory, MiB |",
            "|---:|---|---:|---:|---:|---:|---:|",
            *rows,
        ]
    )
    publish(f"Refit {on_a(device)}", text, options.write)


if __name__ == "__main__":
    main()
