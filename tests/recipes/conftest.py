"""A SLURM of two nodes on this machine, and a home for what nemo-run writes."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.environments import PROJECT, Run


@pytest.fixture(scope="session", autouse=True)
def nemo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NEMORUN_HOME of this process and its children; nemo-run reads it when it is imported."""
    folder = tmp_path_factory.mktemp("nemo")
    os.environ["NEMORUN_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Environment variables with which SLURM's commands talk to a cluster made for these tests."""
    script = str(PROJECT / "slurm" / "dev_cluster.sh")
    own = os.environ | {"TRD_CLUSTER_DIR": f"/tmp/trd-recipes-{os.getpid()}"}
    started = subprocess.run([script, "up"], env=own, stdout=subprocess.PIPE, text=True)
    if started.returncode == 3:
        pytest.skip("no SLURM here (apt-get install slurmctld slurmd slurm-client munge)")
    assert started.returncode == 0
    exports = [word.partition("=") for word in shlex.split(started.stdout) if "=" in word]
    yield os.environ | {name: value for name, _, value in exports}
    subprocess.run([script, "down"], env=own, check=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`python -m recipes.NAME ARGUMENTS` in this process and an empty folder: exit code, output and errors."""
    from recipes import nemo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            nemo.main(name)
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run
