from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from tests.recipes.environments import Run
from tests.slurm.cluster import PROJECT, Cluster


@pytest.fixture(scope="session", autouse=True)
def nemo_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A NEMORUN_HOME for this process and its children; nemo-run reads it when it is imported."""
    os.environ["NEMORUN_HOME"] = str(tmp_path_factory.mktemp("nemo"))


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


@pytest.fixture
def cluster(nodes: dict[str, str], tmp_path: Path) -> Cluster:
    """The cluster, seen from this test's folder."""
    # The nodes share this machine's cores: ranks that have a node each would take all of them each.
    return Cluster(nodes | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}, tmp_path)
