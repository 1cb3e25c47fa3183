"""nemo-run against a real SLURM: what sbatch accepts, jobs that finish, fail, and are stopped and started again."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.common import recipe_names
from tests.recipes.environments import PROJECT, Run

SECONDS = 300  # a job may take on a busy machine
# Two nodes of one rank: the layout that the embedded recipe wants. They are one machine, whose ports jobs share.
NODES = ["executor=slurm", "executor.nodes=2", "executor.ntasks_per_node=1"]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(cluster: dict[str, str], tmp_path: Path) -> Command:
    """Run a program that talks to the cluster, in this test's folder."""
    # The nodes share this machine's cores: ranks that have a node each would take all of them each.
    environment = cluster | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}

    def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, **options
        )

    return command


def recipe(command: Command, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m recipes.NAME ARGUMENTS`."""
    return command(sys.executable, "-m", f"recipes.{name}", *arguments)


def free_port() -> str:
    """For torchrun's rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"executor.launcher.rdzv_port={probe.getsockname()[1]}"


def steps(folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run so far."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; fails after `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.parametrize("name", recipe_names())
def test_sbatch_accepts_a_dry_run(run: Run, command: Command, name: str) -> None:
    _, script, _ = run(name, "executor=slurm", "data.path=nowhere.jsonl", "--dryrun")
    done = command("sbatch", "--test-only", input=script)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Job \d+ to start at", done.stderr)


def test_a_job_on_two_nodes_trains_as_the_local_executor_does(command: Command, tmp_path: Path) -> None:
    shared = ["steps=2", "batch_size=4", "data.chat_template_kwargs={enable_thinking: false}", "--yes"]
    done = recipe(command, "opsd_demo", *NODES, free_port(), *shared, "run_dir=on slurm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "opsd_demo: COMPLETED, output in " in done.stdout
    assert recipe(command, "opsd_demo", *shared, "run_dir=here").returncode == 0
    here, there = steps(tmp_path / "here"), steps(tmp_path / "on slurm")
    assert len(here) == 2
    # A rank has a node, and the threads of its cores, to itself: sums are not to the same bits.
    assert [step["loss"] for step in there] == pytest.approx([step["loss"] for step in here], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["executor.setup_lines=exit 3"], 1, "FAILED, see "),
        (["executor.partition=nowhere"], 1, "partition"),
        (["executor.account=a b"], 0, ""),  # this cluster has no accounts and takes any; it must survive the quoting
    ],
)
def test_what_becomes_of_a_job_is_the_exit_code(
    command: Command, arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    # A job that only looks at its batch script's surroundings: `true` takes torchrun's place.
    (tmp_path / "torchrun").symlink_to("/bin/true")
    path = f"executor.env_vars={{'PATH': '{tmp_path}:{os.environ['PATH']}'}}"
    done = recipe(command, "opsd_demo", *NODES, path, *arguments, "--yes")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code:
        *_, line = done.stderr.splitlines()
        assert line.startswith("recipes.opsd_demo: ")
        assert says in line


def test_a_job_that_is_stopped_starts_again_and_goes_on(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = recipe(
        command, "opsd_demo", *NODES, free_port(), "executor.retries=1", "steps=6", "batch_size=4", "run_dir=run",
        "--yes", "--detach",
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    [job] = command("squeue", "--noheader", "--format=%i").stdout.split()

    def state() -> str:
        return command("squeue", "--noheader", f"--job={job}", "--format=%T").stdout.strip()

    wait_until(lambda: len(steps(run)) > 0)
    assert command("scancel", "--signal=TERM", job).returncode == 0  # as SLURM does ahead of the time limit
    wait_until(lambda: state() == "PENDING")
    saved = len(steps(run))
    assert 0 < saved < 6
    assert command("scontrol", "update", f"jobid={job}", "starttime=now").returncode == 0
    wait_until(lambda: "JobState=COMPLETED" in command("scontrol", "show", "job", job).stdout)
    assert [step["step"] for step in steps(run)] == list(range(6))
    assert (run / "checkpoints" / f"step_{saved}").is_dir()
