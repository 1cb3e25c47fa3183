"""nemo-run against a real SLURM: what sbatch accepts, jobs that finish, fail, and are stopped and started again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.common import recipe_names
from tests.recipes.environments import Run
from tests.slurm.cluster import SECONDS, Cluster
from tests.training.jobs import metrics

# Two nodes of one rank: the layout that the embedded recipe wants.
NODES = ["executor=slurm", "executor.nodes=2", "executor.ntasks_per_node=1"]


def recipe(cluster: Cluster, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m recipes.NAME ARGUMENTS`."""
    return cluster.run(sys.executable, "-m", f"recipes.{name}", *arguments)


def free_port() -> str:
    """For torchrun's rendezvous: the nodes are one machine, whose ports all jobs share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"executor.launcher.rdzv_port={probe.getsockname()[1]}"


@pytest.mark.parametrize("name", recipe_names())
def test_sbatch_accepts_a_dry_run(run: Run, cluster: Cluster, name: str, tmp_path: Path) -> None:
    _, script, _ = run(name, "executor=slurm", "data.path=nowhere.jsonl", "--dryrun")
    (tmp_path / "script.sh").write_text(script)
    done = cluster.run("sbatch", "--test-only", "script.sh")
    assert done.returncode == 0, done.stderr
    assert " to start at " in done.stderr


def test_a_job_on_two_nodes_trains_as_the_local_executor_does(cluster: Cluster, tmp_path: Path) -> None:
    shared = ["steps=2", "batch_size=4", "data.chat_template_kwargs={enable_thinking: false}", "--yes"]
    done = recipe(cluster, "opsd_demo", *NODES, free_port(), *shared, "run_dir=on slurm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "opsd_demo: COMPLETED, output in " in done.stdout
    assert recipe(cluster, "opsd_demo", *shared, "run_dir=here").returncode == 0
    here, there = metrics(tmp_path / "here"), metrics(tmp_path / "on slurm")
    assert len(here) == 2
    # A rank that has a node to itself computes with more threads: sums are not to the same bits.
    assert [step["loss"] for step in there] == pytest.approx([step["loss"] for step in here], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["executor.setup_lines=exit 3"], 1, "FAILED, see "),
        (["executor.partition=nowhere"], 1, "partition"),
        (["executor.account=a b"], 0, ""),  # this cluster takes any account; it must survive the quoting
    ],
)
def test_what_becomes_of_a_job_is_the_exit_code(
    cluster: Cluster, arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "torchrun").symlink_to("/bin/true")  # what the ranks do is of no weight here
    path = f"executor.env_vars={{'PATH': '{tmp_path}:{os.environ['PATH']}'}}"
    done = recipe(cluster, "opsd_demo", *NODES, path, *arguments, "--yes")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code:
        *_, line = done.stderr.splitlines()
        assert line.startswith("recipes.opsd_demo: ")
        assert says in line


def test_a_job_that_is_stopped_starts_again_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    shared = ["executor.retries=1", "steps=6", "batch_size=4", "run_dir=run", "--yes", "--detach"]
    started = recipe(cluster, "opsd_demo", *NODES, free_port(), *shared)
    assert started.returncode == 0, started.stderr
    [job] = cluster.run("squeue", "--noheader", "--format=%i").stdout.split()
    assert cluster.field(job, "TresPerNode").endswith("gpu:1"), "one a rank"
    written, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + SECONDS
    while not written.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cluster.run("scancel", "--signal=TERM", job).returncode == 0  # as SLURM does ahead of the time limit
    cluster.start_again(job)
    [saved] = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert saved.name != "step_6"
    cluster.finish(job)
    assert cluster.field(job, "JobState") == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(6))
