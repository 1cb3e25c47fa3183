"""Code shared by several benchmarks."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor


def kernel_bytes(name: str, path: str = "/proc/self/status") -> int:
    """Bytes under this name in a file of /proc: this process's `VmRSS` and `VmHWM`, or `MemAvailable` of /proc/meminfo.

    `VmHWM`, not `ru_maxrss`, is a process's peak: the latter starts from that of its parent.
    """
    [line] = [line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def held_bytes(device: str) -> int:
    """Bytes held now: resident ones on a CPU, allocated ones on a GPU. `peak_bytes` measures from this call on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # if not permitted, the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")
    return kernel_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes held at once since `held_bytes`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else kernel_bytes("VmHWM")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(device: str = "cpu") -> str:
    """The machine's hardware, for a table's head."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {cores()} cores"


def on_a(device: str) -> str:
    """The device as part of a table's title."""
    return {"cpu": "on a CPU", "cuda": "on a GPU"}[device]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, which is float64."""
    return float((found.double() - exact).norm() / exact.norm())


def publish(title: str, text: str, path: Path | None) -> None:
    """Print a benchmark's text; with a `path`, write it there under its title and the command that produced it."""
    print(text)
    if path is not None:
        command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        path.write_text(f"# {title}\n\n```\n{command}\n```\n\n{text}\n", encoding="utf-8")


def matches(name: str, texts: list[str]) -> bool:
    """Whether a case's name contains one of `texts`, ignoring case."""
    return any(text.lower() in name.lower() for text in texts)
