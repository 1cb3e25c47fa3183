"""What several benchmarks use."""

from __future__ import annotations

from pathlib import Path


def kernel_bytes(name: str, path: str = "/proc/self/status") -> int:
    """Bytes by this name in a file of /proc: this process's `VmRSS` and `VmHWM`, or `MemAvailable` of /proc/meminfo.

    `VmHWM`, not `ru_maxrss`, is a process's peak: the latter begins with that of its parent.
    """
    [line] = [line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def matches(name: str, texts: list[str]) -> bool:
    """Whether one of `texts` is in a case's name, in small letters or large."""
    return any(text.lower() in name.lower() for text in texts)
