"""What the scripts refuse, and the jobs that are many runs or none: sweeps and evaluations."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPTS, Cluster, plain_environment
from tests.training.jobs import metrics

# Responses end before their first line does: all are cut off, and trained on as they are.
SHORT = ["steps=1", "batch_size=2", "data.overlong=cut"]
SHORT += [f"sampler.max_{kind}_tokens=8" for kind in ("rollout", "refinement")]


def script(name: str, *arguments: object, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script where sbatch is a program that must not be reached, unless it is left out (`PATH=`)."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    sbatch = programs / "sbatch"
    sbatch.write_text("#!/bin/sh\necho submitted\n")
    sbatch.chmod(0o755)
    environment = plain_environment() | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        [SCRIPTS / name, *map(str, arguments)], env=environment, cwd=folder, capture_output=True, text=True, timeout=900
    )


def ours(output: str) -> list[str]:
    """Lines of a job that are not srun's."""
    return [line for line in output.splitlines() if not line.startswith("srun: ")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("submit.sh", ["opsd_llama"], "no job script for recipe 'opsd_llama': opd_qwen3_1_7b"),
        ("sweep.sh", [], "usage: sweep.sh [sbatch options] RECIPE [key=value ...]; recipes: opd_qwen3_1_7b"),
        ("sweep.sh", ["opsd_demo", "seed=0,1,0"], "'seed=0,1,0': a value is there twice"),
        ("submit.sh", ["opsd_demo", "stepz=3"], "stepz"),
        ("sweep.sh", ["opsd_demo", "steps=many,2"], "steps='many'"),
        ("submit.sh", ["--nodes=3", "--gpus-per-node=1", "opsd_demo", "student.tp=2"], "3"),
        ("submit.sh", ["opsd_qwen3_8b"], "models/Qwen3-8B"),
        ("submit.sh", ["opsd_demo", "run_dir=file"], "run folder 'file'"),
        ("submit.sh", ["opsd_demo", "run_dir=begun"], "was begun with"),
        ("sweep.sh", ["opsd_demo", "run_dir=begun"], "was begun with"),
    ],
)
def test_bad_input_is_one_line_before_a_job_is_submitted(
    name: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in ("begun", "begun/run"):  # a sweep's runs are folders of it
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text("steps: 77\n")
    before = sorted(tmp_path.rglob("*"))
    done = script(name, *arguments, folder=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "submitted" not in done.stdout
    [line] = done.stderr.splitlines()
    assert message in line
    after = {path for path in tmp_path.rglob("*") if "programs" not in path.parts}
    assert after == set(before), "nothing was made or overwritten"


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    """Also what `need srun` of the job itself comes down to."""
    programs = tmp_path / "few"
    programs.mkdir()
    for program in ("bash", "dirname", "basename", "sed", "grep", "xargs"):
        found = shutil.which(program)
        assert found
        (programs / program).symlink_to(found)
    done = script("submit.sh", "opsd_demo", folder=tmp_path, PATH=str(programs))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "submit.sh: sbatch not found: this needs SLURM's commands; 'megatron-trd train' runs without them"
    ]


def test_a_site_file_s_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("# ours\nSBATCH_ACCOUNT=me\nexport PARTITION=gpu\n")
    done = script("submit.sh", "opsd_demo", folder=tmp_path, TRD_SITE=str(site))
    assert done.returncode == 2
    assert f"{site} line 3: expected KEY=value, found 'export PARTITION=gpu'" in done.stderr
    done = script("submit.sh", "opsd_demo", folder=tmp_path, TRD_SITE=str(tmp_path / "nowhere"))
    assert "no such file" in done.stderr


def test_the_site_file_reaches_sbatch_and_the_environment_has_precedence(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("SBATCH_ACCOUNT=theirs\nSBATCH_PARTITION=gpu\n")
    done = script("submit.sh", "opsd_demo", folder=tmp_path, TRD_SITE=str(site), SBATCH_ACCOUNT="mine")
    assert (done.returncode, done.stdout) == (0, "submitted\n"), done.stderr
    printing = tmp_path / "printing"
    printing.mkdir()
    (printing / "sbatch").write_text('#!/bin/sh\necho "$SBATCH_ACCOUNT $SBATCH_PARTITION $*"\n')
    (printing / "sbatch").chmod(0o755)
    path = f"{printing}:{os.environ['PATH']}"
    done = script("submit.sh", "--nodes=2", "opsd_demo", "steps=3", folder=tmp_path, TRD_SITE=str(site), PATH=path)
    assert done.stdout.split() == ["theirs", "gpu", "--nodes=2", str(SCRIPTS / "opsd_demo.sh"), "steps=3"]


def test_a_job_refuses_bad_input_once_and_for_all(cluster: Cluster, tmp_path: Path) -> None:
    """Plain `sbatch` checks nothing: the job does, before its ranks start, and does not start itself again."""
    run = tmp_path / "run"
    job = cluster.submit(SCRIPTS / "opsd_demo.sh", "student.hidden=3", f"run_dir={run}", TRD_DOCTOR="skip")
    code, output = cluster.finish(job)
    assert code == "2"
    [line] = ours(output)
    assert "student.hidden" in line
    assert cluster.field(job, "Restarts") == "0"
    assert not run.exists()
    none = cluster.submit("--gpus-per-node=0", SCRIPTS / "opsd_demo.sh", f"run_dir={run}")
    code, output = cluster.finish(none)
    assert code == "2"
    assert "no GPUs in this allocation" in output


def test_a_sweep_s_runs_and_an_evaluation_after_one(cluster: Cluster, tmp_path: Path) -> None:
    sweep, data = tmp_path / "sweep", tmp_path / "problems.jsonl"
    data.write_text('{"problem": "12 + 34 = ?", "answer": "46"}\n')
    arguments = ["--parsable", "opsd_demo", *SHORT, "method=trd-opsd,opsd-forward-kl"]
    done = cluster.run(SCRIPTS / "sweep.sh", *arguments, f"run_dir={sweep}", TRD_DOCTOR="skip", TRD_AT_ONCE="1")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    run = sweep / "method=trd-opsd"
    evaluation = cluster.submit(
        f"--dependency=afterok:{job}",
        "--gpus-per-node=1",
        SCRIPTS / "eval.sh",
        run,
        data,
        "sampler.max_rollout_tokens=8",
    )
    code, output = cluster.finish(evaluation)
    assert code == "0", output
    assert "avg@16" in output
    for task, method in enumerate(("trd-opsd", "opsd-forward-kl")):
        folder = sweep / f"method={method}"
        assert len(metrics(folder)) == 1
        assert f"method: {method}\n" in (folder / "config.yaml").read_text()
        assert [path.name for path in (folder / "logs").iterdir()] == [
            f"slurm-{cluster.field(f'{job}_{task}', 'JobId')}-0"
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage: sbatch slurm/eval.sh RUN_DIR|MODEL DATA"), (["nowhere", "data.jsonl"], "nowhere")],
)
def test_an_evaluation_refuses_bad_input(cluster: Cluster, arguments: list[str], message: str) -> None:
    code, output = cluster.finish(cluster.submit("--gpus-per-node=1", SCRIPTS / "eval.sh", *arguments))
    assert code == "2"
    [line] = ours(output)
    assert message in line
