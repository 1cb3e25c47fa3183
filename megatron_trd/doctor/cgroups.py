"""Limits that a container or a batch system sets for this process: control groups, versions 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def memory_left() -> float:
    """Bytes of memory that may still be used; infinite without a limit."""
    left = math.inf
    for group in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            # The page cache counts as used, and is released when memory is requested.
            left = min(left, _number(group / limit) - _number(group / used, 0.0) + _statistic(group, cache))
    return left


def tasks_left() -> float:
    """Processes and threads that may still be started; infinite without a limit."""
    return min(
        (_number(group / "pids.max") - _number(group / "pids.current", 0.0) for group in _groups("pids")),
        default=math.inf,
    )


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process, innermost first. Not all of them need exist here."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT  # version 2 has one tree for all controllers
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _number(file: Path, default: float = math.inf) -> float:
    try:
        text = file.read_text().strip()
    except OSError:
        return default
    return math.inf if text == "max" else float(text)


def _statistic(group: Path, name: str) -> float:
    try:
        values = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0.0
    return float(values.get(name, 0))
