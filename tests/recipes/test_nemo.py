"""nemo-run's command line on recipes: what it exports, prints, refuses and starts on this machine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_trd.config import apply_overrides, load
from recipes.common import find_recipe, recipe_names
from tests.recipes.environments import Run, python, without
from tests.slurm.cluster import PROJECT


def batch_script(output: str) -> str:
    """The line of a dry run's output that starts the ranks."""
    [line] = [line for line in output.splitlines() if line.startswith("srun ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optimizer.lrr=1"], ["'optimizer.lrr'", "did you mean 'optimizer.lr'"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["steps"], ["'steps'", "key=value"]),
        (["method=trd"], ["method", "trd-opsd"]),
        (["--factory", "opsd_dmo"], ["opsd_dmo", "opsd_demo"]),
        (["--yaml", "nowhere.yaml"], ["nowhere.yaml"]),
        (["executor=nowhere"], ["executor", "nowhere"]),
        (["executor=slurm", "executor.nodez=2"], ["executor", "'nodez'"]),
        (["executor=slurm", "executor.nodes=two"], ["executor", "'two'"]),
        (["run.nonsense=1"], ["'nonsense'"]),
        (["executor.ntasks_per_node=3"], ["1 × 3 ranks", "student tp=2", "multiple of 2"]),
        (["executor.ntasks_per_node=3", "teacher.weights=frozen", "lora.rank=4"], ["teacher tp=2", "multiple of 2"]),
        (["executor=slurm", "executor.nodes=3", "executor.ntasks_per_node=1"], ["3 × 1 ranks", "multiple of 2"]),
        (["executor.ntasks_per_node=4", "world_size=2"], ["world_size=2", "4 ranks"]),
        (["student.tp=3"], ["student.tp=3", "attention heads"]),
        (["model=nowhere"], ["'nowhere'", "no such folder"]),
        (["data.path=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--direct"], ["--direct"]),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: list[str], says: list[str]) -> None:
    for option in ("--yes", "--dryrun"):
        code, _, err = run("opsd_demo", *arguments, option)
        assert code == 2
        assert "Traceback" not in err
        *_, line = err.splitlines()
        assert err.count("recipes.opsd_demo: ") == 1
        assert line.startswith("recipes.opsd_demo: ")
        for part in says:
            assert part in line


def test_a_folder_of_another_run_is_left_alone(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "opsd_demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 7\n")
    for arguments in (["--dryrun"], ["--yes"]):
        code, _, err = run("opsd_demo", *arguments)
        assert code == 2
        assert "was begun with" in err.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_nothing_starts_without_a_yes(run: Run, tmp_path: Path) -> None:
    code, _, err = run("opsd_demo")
    assert code == 2
    assert "add --yes" in err
    assert not (tmp_path / "runs" / "opsd_demo" / "config.yaml").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_exported_as_it_would_run(run: Run, name: str, tmp_path: Path) -> None:
    overrides = ["steps=7", "student.tp=2", "teacher.tp=2", "sampler.tp=2", "data.chat_template_kwargs={a: b c}"]
    code, _, err = run(name, *overrides, "--to-yaml", "run.yaml", "--to-json", "run.json", "executor=slurm")
    assert code == 0, err
    exported = load(tmp_path / "run.yaml")
    assert exported.world_size in (6, 8, 16)  # 16: the mixture of experts
    assert exported == apply_overrides(find_recipe(name), [*overrides, f"world_size={exported.world_size}"])
    assert json.loads((tmp_path / "run.json").read_text())["student"]["tp"] == 2


def test_an_exported_file_is_a_recipe(run: Run) -> None:
    assert run("opsd_demo", "steps=7", "--to-yaml", "run.yaml")[0] == 0
    code, out, _ = run("opsd_demo", "--yaml", "run.yaml", "--dryrun")
    assert code == 0
    assert shlex.split(out)[-2:] == ["run.yaml", "--resume"]


def test_a_local_dry_run_prints_a_command(run: Run) -> None:
    code, out, _ = run("opsd_demo", "steps=7", "run_dir=my run", "executor.ntasks_per_node=4", "--dryrun")
    assert code == 0
    python, *command = shlex.split(out)
    assert python == sys.executable
    assert command[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    arguments = ["opsd_demo", "steps=7", "run_dir=my run", "world_size=4", "--resume"]
    assert command[4:] == ["-m", "megatron_trd.training.worker", *arguments]


@pytest.mark.parametrize("name", recipe_names())
def test_a_dry_run_prints_the_batch_script(run: Run, name: str) -> None:
    code, out, err = run(name, "executor=slurm", "data.path=nowhere.jsonl", "--dryrun")
    assert out.startswith("#!/bin/bash\n")
    nodes, ranks = (2, 8) if name == "opsd_qwen3_30b_a3b" else (1, 6 if name == "opsd_smollm2_gsm8k" else 8)
    assert f"#SBATCH --nodes={nodes}\n" in out
    assert f"#SBATCH --gpus-per-node={ranks}\n" in out
    assert f"--nproc-per-node {ranks} " in batch_script(out)
    assert f"worker {name} data.path=nowhere.jsonl world_size={nodes * ranks} --resume" in batch_script(out)
    assert code == 2  # what it would be refused for comes after it
    assert len([line for line in err.splitlines() if line.startswith(f"recipes.{name}: ")]) == 1


@pytest.mark.parametrize(
    ("arguments", "asked", "ranks"),
    [
        (["executor.gpus_per_node=null"], None, 8),
        (["executor.gpus_per_node=4"], 4, 4),
        (["executor.ntasks_per_node=4"], 4, 4),
        (["executor.gres=gpu:a100:8"], None, 8),
    ],
)
def test_each_rank_has_a_gpu_unless_told_otherwise(
    run: Run, arguments: list[str], asked: int | None, ranks: int
) -> None:
    _, out, _ = run("opsd_demo", "executor=slurm", *arguments, "--dryrun")
    found = [line for line in out.splitlines() if "--gpus" in line]
    assert found == ([f"#SBATCH --gpus-per-node={asked}"] if asked else [])
    assert f"--nproc-per-node {ranks} " in batch_script(out)


def test_ranks_start_in_this_folder(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("opsd_demo", "executor=slurm", "--dryrun")
    *_, last = [word for word in shlex.split(batch_script(out)) if word.startswith("--chdir")]
    assert last == f"--chdir={tmp_path}"


def test_the_pages_executors_of_a_site(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "recipes.md").read_text(), re.DOTALL)
    (tmp_path / "workspace.py").write_text(example)
    environment = without(tmp_path, "nothing")

    def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return python(environment, tmp_path, "-m", "recipes.opsd_demo", *arguments, "--dryrun")

    here = dry_run("executor=here", "executor.nodes=2", "executor.gpus_per_node=4")
    assert (here.returncode, here.stderr.count("recipes.opsd_demo: ")) == (0, 0)
    for line in ("account=me", "gpus-per-node=4", "nodes=2", "time=12:00:00"):
        assert f"#SBATCH --{line}\n" in here.stdout
    assert "--nproc-per-node 4 " in batch_script(here.stdout)
    for arguments in (["executor=in_container"], ["executor=far_away", "executor.srun_args=[]"]):
        refused = dry_run(*arguments)
        assert refused.returncode == 2
        assert "run_dir 'runs/opsd_demo' is relative" in refused.stderr.splitlines()[-1]
    container = dry_run("executor=in_container", "run_dir=/shared/run")
    assert container.returncode == 0
    assert "--container-image /images/megatron-trd.sqsh" in batch_script(container.stdout)
    far = dry_run("executor=far_away")
    assert far.returncode == 0
    assert "source /shared/me/venv/bin/activate\n" in far.stdout
    assert " --chdir=/shared/me/work torchrun " in batch_script(far.stdout)


def test_a_login_node_has_no_torch(tmp_path: Path) -> None:
    environment = without(tmp_path, "torch", "transformers", "vllm", "megatron", "datasets", "numpy")
    done = python(environment, tmp_path, "-m", "recipes.opsd_demo", "executor=slurm", "--dryrun")
    assert (done.returncode, done.stdout[:12]) == (0, "#!/bin/bash\n"), done.stderr
    done = python(environment, tmp_path, "-m", "recipes.opsd_qwen3_8b", "executor=slurm", "--dryrun")
    assert (done.returncode, done.stdout[:12]) == (2, "#!/bin/bash\n")
    assert "model 'models/Qwen3-8B': no such folder" in done.stderr.splitlines()[-1]
    done = python(environment, tmp_path, "-m", "recipes.opsd_demo", "--yes")
    assert done.returncode == 2
    assert "no torch here" in done.stderr.splitlines()[-1]


def test_nemo_runs_own_command_has_the_recipes(tmp_path: Path) -> None:
    nemorun = Path(sys.executable).with_name("nemorun")
    command = [nemorun, "recipes", "opsd_demo", "executor=slurm", "steps=3", "--dryrun"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worker opsd_demo steps=3 world_size=8 --resume" in batch_script(done.stdout)


def test_the_local_executor_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.opsd_demo", "steps=2", "batch_size=4", "run_dir=my run", "--yes"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "NEMORUN_HOME": str(tmp_path / "nemo")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)  # no torchrun on PATH
    assert done.returncode == 0, done.stderr
    assert "opsd_demo: SUCCEEDED, output in " in done.stdout
    metrics = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1]
    assert load(tmp_path / "my run" / "config.yaml").world_size == 2
