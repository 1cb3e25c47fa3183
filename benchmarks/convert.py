"""Conversions of generated models: peak memory beside the largest layer, throughput beside a copy of the same bytes.

    python -m benchmarks.convert --gigabytes 1 2 4 --write benchmarks/results/convert.md

A layer here is a decoder layer, or the embedding: whichever is larger. Memory is what the process takes on top of what
it has after its imports, as the operating system counts it (`VmHWM`, mapped files included). The floor copies the
input's bytes to the same disk and waits for the disk (fsync), as a conversion does. Each is run `--repeats` times in
turn, all in processes of their own, and the median counts. Sources are in the page cache where they fit; right before
its run each process writes and deletes as many bytes, so that all find memory that the machine has at hand (a virtual
machine gives free memory back to its host, and gets it anew at 0.5 GB/s).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import kernel_bytes, machine, publish
from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.export import FolderWriter, exported_tensors
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.weights import slots

_MODEL: dict[str, Any] = {  # hidden sizes of Qwen3-4B, with fewer layers
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclasses.dataclass
class _Run:
    """One run of one task in a process of its own."""

    seconds: float
    peak: int  # bytes on top of those of the imports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936, 32000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--write", type=Path, help="also write the table here")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)  # this process is one run: task, source, target
    options = parser.parse_args()
    if options.task:
        name, source, target = options.task
        print(json.dumps(dataclasses.asdict(_measure(name, Path(source), Path(target)))))
        return
    rows = []
    for vocabulary in options.vocabulary:
        for size in options.gigabytes:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                rows += _compare(Path(folder), size * 1e9, vocabulary, options.repeats)
    table = "\n".join([_head(options.repeats), *rows])
    publish("Conversions", table, options.write)


def _head(repeats: int) -> str:
    return "\n".join(
        [
            f"{machine()}, torch {torch.__version__}; medians of {repeats}. Layers of "
            "Qwen3-4B, bf16, tied. “peak / layer” is peak memory on top of the imports over the largest layer.",
            "",
            "| model | vocabulary | largest layer | task | peak memory | peak / layer | time | GB/s | of a copy's |",
            "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
        ]
    )


def _compare(folder: Path, size: float, vocabulary: int, repeats: int) -> list[str]:
    arch = _generate(folder / "hf", size, vocabulary)
    largest, total = _largest_layer(arch), _bytes(folder / "hf")
    tasks = {
        "copy": (folder / "hf", folder / "copy"),
        "hf_to_megatron": (folder / "hf", folder / "megatron"),
        "megatron_to_hf": (folder / "megatron", folder / "back"),
    }
    runs: dict[str, list[_Run]] = {name: [] for name in tasks}
    for _ in range(repeats):
        shutil.rmtree(folder / "megatron", ignore_errors=True)
        for name, (source, target) in tasks.items():
            runs[name].append(_in_a_process(name, source, target))
            if name != "hf_to_megatron":
                shutil.rmtree(target)
    floor = median(run.seconds for run in runs["copy"])
    rows = []
    for name, done in runs.items():
        seconds, peak = median(run.seconds for run in done), median(run.peak for run in done)
        memory = f"{peak / 1e6:.0f} MB | {peak / largest:.2f}" if name != "copy" else " | "
        rows.append(
            f"| {total / 1e9:.2f} GB | {vocabulary:,} | {largest / 1e6:.0f} MB | {name} | {memory} | {seconds:.1f} s | "
            f"{total / 1e9 / seconds:.2f} | {floor / seconds:.0%} |"
        )
    return rows


def _generate(folder: Path, size: float, vocabulary: int) -> Architecture:
    """A folder of random weights of about `size` bytes."""
    layer = 2 * sum(slot.size for slot in slots(_architecture(folder, 1, vocabulary))[1:-2])
    layers = max(1, round((size - 2 * vocabulary * _MODEL["hidden_size"]) / layer))
    arch = _architecture(folder, layers, vocabulary)
    infos = exported_tensors(arch, lambda _: torch.bfloat16)
    writer = FolderWriter(folder, infos)
    for info in infos:
        writer.write(info.name, torch.randint(-(2**14), 2**14, info.shape, dtype=torch.int16).view(torch.bfloat16))
    writer.close(_like(folder, layers, vocabulary), torch.bfloat16)
    return arch


def _like(folder: Path, layers: int, vocabulary: int) -> ModelFolder:
    like = folder.with_name("like")
    like.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    config = _MODEL | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (like / "config.json").write_text(json.dumps(config))
    return ModelFolder(like)


def _architecture(folder: Path, layers: int, vocabulary: int) -> Architecture:
    return read_architecture(_like(folder, layers, vocabulary))


def _largest_layer(arch: Architecture) -> int:
    table = slots(arch)
    layer = sum(slot.size for slot in table if slot.index and slot.layer == 0)
    return 2 * max(layer, table[0].size)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _in_a_process(name: str, source: Path, target: Path) -> _Run:
    os.sync()  # so that no run pays for another's pending writes
    command = [sys.executable, "-m", "benchmarks.convert", "--task", name, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return _Run(**json.loads(done.stdout.splitlines()[-1]))


def _measure(name: str, source: Path, target: Path) -> _Run:
    import transformers  # noqa: F401  imports needed to read a configuration, before memory is measured

    ModelFolder(source / "hf" if (source / "hf").is_dir() else source).config  # noqa: B018
    _touch_memory(target.with_name("touched"), _bytes(source))
    before = kernel_bytes("VmRSS")
    begin = time.perf_counter()
    if name == "copy":
        _copy(source, target)
    elif name == "hf_to_megatron":
        hf_to_megatron.convert(source, target)
    else:
        megatron_to_hf.convert(source, target)
    seconds = time.perf_counter() - begin
    return _Run(seconds, kernel_bytes("VmHWM") - before)


def _touch_memory(path: Path, size: int) -> None:
    block = bytes(2**24)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    path.unlink()


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
