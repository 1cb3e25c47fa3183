"""Environments that lack packages, as a login node does; and programs run in them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import PROJECT

Run = Callable[..., tuple[int, str, str]]  # a program's arguments -> exit code, output and errors


def without(folder: Path, *packages: str) -> dict[str, str]:
    """Environment variables in which `python -S` finds everything that is installed but `packages`."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not any(entry.name == package or entry.name.startswith(f"{package}-") for package in packages):
            (folder / entry.name).symlink_to(entry)
    return os.environ | {"PYTHONPATH": f"{PROJECT}:{folder}", "NEMORUN_HOME": str(folder)}


def python(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -S ARGUMENTS` in a folder."""
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
