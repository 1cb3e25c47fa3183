"""Jobs on two nodes: what they compute, and that stopping, killing or requeueing one changes nothing but its time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_trd.config import apply_overrides, flatten
from recipes.common import find_recipe
from tests.slurm.cluster import PROJECT, SCRIPTS, SECONDS, Cluster, ranks
from tests.training.jobs import metrics

# TP 2 over two nodes of one rank, on the embedded model.
SETTINGS = ["steps=6", "batch_size=4", "checkpoint.every=1"]
NODES = ["--nodes=2", "--gpus-per-node=1"]
SAME = ("step", "loss", "grad_norm", "lr", "divergence/mean", "tokens/trained", "length/rollout", "length/refinement")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What must not differ between two runs, to the bit."""
    return [{key: row[key] for key in SAME} for row in metrics(folder)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run under plain torchrun: two of them on this machine, as two nodes of one rank."""
    folder = tmp_path_factory.mktemp("plain")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    worker = ["-m", "megatron_trd.training.worker", "opsd_demo", *SETTINGS, f"run_dir={folder / 'run'}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", *worker],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=PROJECT,
        )
        for rank in range(2)
    ]
    try:
        assert [node.wait(SECONDS) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    found = rows(folder / "run")
    assert len(found) == 6
    return found


def test_a_job_is_as_plain_torchrun_and_has_its_run_folder_for_itself(
    cluster: Cluster, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    script, run = SCRIPTS / "opsd_demo.sh", tmp_path / "run"
    job = cluster.submit(*NODES, script, *SETTINGS, f"run_dir={run}")
    cluster.wait_for(job, "step 1/6")
    for pid in ranks(cluster, job):  # for as long as the second job takes to come
        os.kill(pid, signal.SIGSTOP)
    begun = (run / "config.yaml").read_bytes()
    second = cluster.submit("--nodes=1", script, *SETTINGS, "log.samples_per_step=0", f"run_dir={run}")
    code, output = cluster.finish(second)
    assert code == "2"
    assert f"run folder '{run}' is in use by SLURM job {job}" in output
    assert (run / "config.yaml").read_bytes() == begun
    for pid in ranks(cluster, job):
        os.kill(pid, signal.SIGCONT)
    code, output = cluster.finish(job)
    assert code == "0", output
    assert rows(run) == expected
    assert "all-reduce" in output, "megatron-trd doctor looked at the nodes first"
    assert output.count("step 6/6") == 1, "one rank prints"
    assert {path.name for path in (run / "logs" / f"slurm-{job}-0").iterdir()} == {"n1", "n2"}
    assert not (run / "lock").exists()


def test_a_run_that_is_stopped_killed_and_requeued_is_as_an_unbroken_one(
    cluster: Cluster, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*NODES, SCRIPTS / "opsd_demo.sh", *SETTINGS, "checkpoint.every=2", f"run_dir={run}"]
    job = cluster.submit(*arguments, TRD_DOCTOR="skip", TRD_MAX_RESTARTS="2")

    cluster.wait_for(job, "step 1/6")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "starting again")
    stopped = len(rows(run))
    assert f"stopped on request; step {stopped} of 6 is saved" in cluster.output(job)
    assert stopped < 4, "stopped too late to test anything"

    cluster.start_again(job)
    cluster.wait_for(job, f"step {stopped + 1}/6")
    os.kill(ranks(cluster, job)[-1], signal.SIGKILL)
    cluster.wait_for(job, "starting again", times=2)
    assert cluster.output(job).count("rank 1 failed: killed by SIGKILL") == 1

    cluster.start_again(job)
    cluster.wait_for(job, f"step {stopped + 1}/6", times=2)
    cluster.run("scontrol", "requeue", job)
    code, output = cluster.finish(job)
    assert code == "0", output
    assert rows(run) == expected
    # It was started again at once, not after SLURM's two minutes: a late signal to the killed step was once seen to end
    # the new one of the same number, and the job to start once more.
    assert int(cluster.field(job, "Restarts")) in (3, 4)


def test_the_warning_ahead_of_the_time_limit_is_not_lost_while_the_ranks_start(
    cluster: Cluster, tmp_path: Path
) -> None:
    """SLURM sends it to the job script once; the ranks listen late, and what they start must survive it."""
    run = tmp_path / "run"
    job = cluster.submit(*NODES, SCRIPTS / "opsd_demo.sh", *SETTINGS, f"run_dir={run}", TRD_DOCTOR="skip")
    cluster.wait_for(job, "none saved yet")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "starting again")
    output = cluster.output(job)
    assert "stopped on request; step 1 of 6 is saved" in output, output
    cluster.run("scancel", job)


def test_the_script_of_the_8b_recipe_runs_the_embedded_model(
    cluster: Cluster, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begun, wanted = (flatten(find_recipe(name)) for name in ("opsd_qwen3_8b", "opsd_demo"))
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}"
        for key, value in wanted.items()
        if value != begun[key] and key != "run_dir"
    ]
    assert len(overrides) > 5
    job = cluster.submit(
        *NODES, SCRIPTS / "opsd_qwen3_8b.sh", *overrides, *SETTINGS, f"run_dir={run}", TRD_DOCTOR="skip"
    )
    code, output = cluster.finish(job)
    assert code == "0", output
    assert rows(run) == expected
    assert flatten(apply_overrides(find_recipe("opsd_demo"), SETTINGS)).keys() == wanted.keys()


def test_a_job_stops_starting_itself_again_when_that_brings_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*NODES, SCRIPTS / "opsd_demo.sh", *SETTINGS, f"run_dir={run}", "sampler.host_kv_cache_gib=1000000"]
    job = cluster.submit(*arguments, TRD_DOCTOR="skip", TRD_MAX_RESTARTS="1")
    code, output = cluster.finish(job)
    assert code == "1"
    assert output.count("starting again") == 1
    assert output.count("not started again: 1 restarts brought no new checkpoint") == 1
    assert cluster.field(job, "Restarts") == "1"
