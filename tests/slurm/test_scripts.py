"""What the scripts refuse, and the jobs that are many runs or none: sweeps and evaluations."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_trd.config import save
from recipes.common import find_recipe
from tests.slurm.cluster import SCRIPTS, Cluster, plain_environment
from tests.training.jobs import metrics

# Responses end before their first line does: all are cut off, and trained on as they are.
SHORT = ["steps=1", "batch_size=2", "data.overlong=cut"]
SHORT += [f"sampler.max_{kind}_tokens=8" for kind in ("rollout", "refinement")]


def program(path: Path, text: str) -> str:
    """Write a program in sh; returns the PATH on which it is found first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


def script(
    name: str, *arguments: object, folder: Path, files: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A script where sbatch is a program that must not be reached, unless it is left out (`PATH=`).

    files: that it may open, as a limit which it can raise.
    """
    path = program(folder / "programs" / "sbatch", "echo submitted")
    environment = plain_environment() | {"PATH": path} | variables

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    return subprocess.run(
        [SCRIPTS / name, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        preexec_fn=limit,
    )


def ours(output: str) -> list[str]:
    """Lines of a job that are not srun's."""
    return [line for line in output.splitlines() if not line.startswith("srun: ")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("submit.sh", ["opsd_llama"], "recipe 'opsd_llama' does not exist; give a YAML file, or one of recipes/"),
        ("submit.sh", ["nowhere.yaml"], "nowhere.yaml"),
        ("submit.sh", ["--nodes", "2", "opsd_demo"], "recipe '2': an option of sbatch and its value are one word here"),
        ("sweep.sh", [], "usage: sweep.sh [sbatch options] RECIPE|FILE.yaml [key=value ...]; recipes: opd_demo opd_qw"),
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


def test_a_cluster_is_not_made_in_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """In /tmp another user may have made it, with a slurm.conf that has programs run as whoever starts the cluster."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for command in ("up", "env", "down"):
        done = script("dev_cluster.sh", command, folder=tmp_path, TRD_CLUSTER_DIR=str(tmp_path / "link"))
        assert done.returncode == 1
        assert f"'{tmp_path / 'link'}' is not a folder of" in done.stderr
    assert list((tmp_path / "theirs").iterdir()) == []


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
    site.write_text("SBATCH_ACCOUNT=theirs\nSBATCH_PARTITION=gpu\na_proxy=at:3128\n")
    done = script("submit.sh", "opsd_demo", folder=tmp_path, TRD_SITE=str(site), SBATCH_ACCOUNT="mine")
    assert (done.returncode, done.stdout) == (0, "submitted\n"), done.stderr
    path = program(tmp_path / "printing" / "sbatch", 'echo "$SBATCH_ACCOUNT $SBATCH_PARTITION $a_proxy $*"')
    done = script("submit.sh", "--nodes=2", "opsd_demo", "steps=3", folder=tmp_path, TRD_SITE=str(site), PATH=path)
    assert done.stdout.split() == ["theirs", "gpu", "at:3128", "--nodes=2", str(SCRIPTS / "opsd_demo.sh"), "steps=3"]


@pytest.mark.parametrize("recipe", ["opd_demo", "my run.yaml"])
def test_what_has_no_script_of_its_own_is_told_to_the_one_for_all(recipe: str, tmp_path: Path) -> None:
    save(find_recipe("opsd_demo"), tmp_path / "my run.yaml")
    path = program(tmp_path / "printing" / "sbatch", r'''printf '%s\n' "$@"''')
    done = script("submit.sh", "--nodes=2", recipe, "steps=3", folder=tmp_path, PATH=path)
    name = f"--job-name={Path(recipe).stem}"
    assert done.stdout.splitlines() == [name, "--nodes=2", str(SCRIPTS / "train.sh"), recipe, "steps=3"], done.stderr
    done = script("sweep.sh", recipe, "seed=1", folder=tmp_path, PATH=path, SBATCH_JOB_NAME="ours")
    assert done.stdout.splitlines() == ["--array=0-0", "--job-name=ours", str(SCRIPTS / "train.sh"), recipe]
    [folder] = (tmp_path / "runs" / "sweeps").iterdir()
    assert folder.name.startswith(Path(recipe).stem)


def test_a_second_sweep_into_a_folder_leaves_the_first_one_s_runs_alone(tmp_path: Path) -> None:
    """Tasks that wait, or are requeued, read the overrides of their run after the second sweep was submitted."""
    path = program(tmp_path / "printing" / "sbatch", 'echo "$TRD_POINTS"')
    files = []
    for seeds in ("0,1", "2"):
        done = script("sweep.sh", "opsd_demo", f"seed={seeds}", "run_dir=a sweep", folder=tmp_path, PATH=path)
        assert done.returncode == 0, done.stderr
        files.append(Path(done.stdout.removesuffix("\n")))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert [line.split("\t")[0] for line in lines] == ["seed=0", "seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("options", "variables", "ranks"),
    [
        ([], {"SBATCH_GPUS_PER_NODE": "3"}, 3),
        (["--nodes=3"], {"SBATCH_GPUS_PER_NODE": "a100:1"}, 3),
        (["--gpus-per-node=a100:4"], {"SBATCH_GPUS_PER_NODE": "3"}, None),
        (["--nodes=3"], {"SBATCH_GPUS_PER_NODE": "1", "SBATCH_GPUS": "4"}, None),
        (["--gpus=4", "--nodes=3"], {"SBATCH_GPUS_PER_NODE": "1"}, None),
    ],
)
def test_ranks_are_counted_as_sbatch_will(
    options: list[str], variables: dict[str, str], ranks: int | None, tmp_path: Path
) -> None:
    """ranks: those that the layout, TP 2, cannot have."""
    done = script("submit.sh", *options, "opsd_demo", folder=tmp_path, **variables)
    assert done.returncode == (2 if ranks else 0), done.stderr
    assert f"world size {ranks} " in done.stderr if ranks else done.stdout == "submitted\n"


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = script("submit.sh", "opsd_demo", folder=tmp_path, TRD_VENV="/path/to/venv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("submit.sh: TRD_VENV=/path/to/venv: no bin/python there; set it in ")
    done = script("node.sh", "once", "json", folder=tmp_path, TRD_VENV="/path/to/venv", SLURMD_NODENAME="n1")
    assert done.returncode == 2
    assert done.stderr == "node.sh: TRD_VENV=/path/to/venv: no bin/python there on n1; mend it in slurm/site.env\n"


@pytest.mark.parametrize(
    ("variables", "whose"),
    [
        ({}, "the project"),
        ({"TRD_CONTAINER_IMAGE": "a.sqsh"}, "the image"),
        ({"TRD_VENV": "venv"}, "TRD_VENV"),
        ({"TRD_CONTAINER_IMAGE": "a.sqsh", "TRD_VENV": "venv"}, "TRD_VENV"),
    ],
)
def test_a_node_s_python_is_that_of_the_environment_or_the_image(
    variables: dict[str, str], whose: str, tmp_path: Path
) -> None:
    path = program(tmp_path / "image" / "python", "echo of the image")
    program(tmp_path / ".venv" / "bin" / "python", "echo of the project")
    program(tmp_path / "venv" / "bin" / "python", "echo of TRD_VENV")
    done = script("node.sh", "once", "json", folder=tmp_path, TRD_PROJECT=str(tmp_path), PATH=path, **variables)
    assert done.stdout == f"of {whose}\n", done.stderr


def test_modules_may_look_at_variables_that_nobody_has_set(tmp_path: Path) -> None:
    """As Lmod's do, where the script itself must not."""
    path = program(tmp_path / "venv" / "bin" / "python", 'echo "$LOADED"')
    module = {"BASH_FUNC_module%%": '() { export LOADED="$NOBODY_SET_IT$LOADED $1 $2"; }'}
    settings = {"TRD_MODULES": "cuda/13 nccl", "TRD_VENV": f"{tmp_path}/venv", "TRD_PROJECT": str(tmp_path)}
    done = script("node.sh", "once", "json", folder=tmp_path, PATH=path, **settings, **module)
    assert (done.stdout, done.returncode) == (" load cuda/13 load nccl\n", 0), done.stderr


def test_a_node_raises_the_number_of_files_that_may_be_open(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("import resource\nprint(*resource.getrlimit(resource.RLIMIT_NOFILE))")
    paths = {"TRD_PROJECT": str(SCRIPTS.parent), "PYTHONPATH": str(tmp_path)}
    done = script("node.sh", "once", "shown", folder=tmp_path, files=256, **paths)
    soft, hard = done.stdout.split()
    assert soft == hard != "256"


def test_what_a_job_tells_its_ranks(cluster: Cluster, tmp_path: Path) -> None:
    """On nodes whose python only says how it was called; the allocation is as `sbatch --gpus` makes it."""
    begin, said = f'*" begin "*) echo {tmp_path};;', '*) echo "$*, active: $TRD_ACTIVE_JOBS"'
    # The first to fail takes the others along: not before all have said their part.
    together = f'touch "{tmp_path}/$SLURM_PROCID"; until [ -e {tmp_path}/0 -a -e {tmp_path}/1 ]; do sleep 0.1; done'
    program(tmp_path / "venv" / "bin" / "python", f'case "$*" in {begin} {said}; {together}; exit 2;; esac')
    waiting = cluster.submit("--hold", SCRIPTS / "train.sh")
    settings = {"TRD_VENV": f"{tmp_path}/venv", "TRD_DOCTOR_OPTIONS": "--timeout 300", "TRD_ACTIVE_JOBS": "another's"}
    job = cluster.submit("--nodes=2", "--gpus=16", SCRIPTS / "train.sh", "my.yaml", "steps=3", **settings)
    code, output = cluster.finish(job)
    cluster.run("scancel", waiting)
    assert code == "2"
    [line] = [line for line in output.splitlines() if "--node-rank=1" in line]
    told, active = line.split(", active: ")
    assert told.endswith(" -m megatron_trd.cli doctor --quick --timeout 300 my.yaml steps=3")
    assert {job, waiting} <= set(active.split())
    assert "another's" not in active
    assert "these nodes cannot run the job" in output
    code, output = cluster.finish(cluster.submit(SCRIPTS / "train.sh"))
    assert code == "2"
    assert "usage: sbatch slurm/train.sh RECIPE|FILE.yaml [key=value ...]" in output


def test_a_job_that_saved_goes_on_though_slurmctld_does_not_answer_at_first(tmp_path: Path) -> None:
    """Its ranks ended well, with steps left: a job that then ended too, with exit code 0, would count as done."""
    silent = "[ -e asked ] || { touch asked; exit 1; }"
    path = program(tmp_path / "fake" / "scontrol", f'{silent}; echo "$1 JobState=RUNNING "')
    program(tmp_path / "fake" / "srun", 'case "$*" in *" begin "*) echo "$PWD";; *" end "*) echo requeue;; esac')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "TRD_RANKS_PER_NODE": "1"}
    done = script("common.sh", "train", "x", folder=tmp_path, PATH=path, TRD_HEAD_ADDRESS="a", TRD_DOCTOR="skip", **job)
    assert done.stdout == "requeue JobState=RUNNING \n", done.stderr
    assert done.returncode == 0


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
    save(find_recipe("opsd_demo"), tmp_path / "mine.yaml")
    arguments = ["--parsable", "--gpus-per-node=2", tmp_path / "mine.yaml", *SHORT, "method=trd-opsd,opsd-forward-kl"]
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
