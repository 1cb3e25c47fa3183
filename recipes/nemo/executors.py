"""Executors: the two that come with the recipes, and the preparation that any executor needs."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nemo_run as run

from megatron_trd.config import StudentConfig, TeacherConfig, TrainConfig
from megatron_trd.errors import UserError

AS_NEEDED = 0  # nodes, or ranks per node: as the recipe needs; GPUs per node: one per rank
_GPUS_A_NODE = 8  # if the executor does not specify it
_POLL_SECONDS = 2.0
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"}  # states of a SLURM job
_ENDED |= {"OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def local() -> Any:
    """torchrun on this machine."""
    return run.Config(run.LocalExecutor, ntasks_per_node=AS_NEEDED)


def slurm() -> Any:
    """sbatch on this machine, whole nodes, working in this folder. Account and the like: `executor.…=` or SBATCH_…."""
    return run.Config(
        run.SlurmExecutor,
        account=None,  # the user's default one
        job_name_prefix="megatron-trd.",
        nodes=AS_NEEDED,
        ntasks_per_node=AS_NEEDED,
        gpus_per_node=AS_NEEDED,  # even on whole nodes, SLURM gives a step only the GPUs that were requested
        time="04:00:00",
        exclusive=True,
        mem="0",  # all of it
        signal="TERM@1800",  # seconds ahead of the time limit: the ranks finish their step and save
        launcher=run.Config(run.Torchrun),
        packager=run.Config(run.Packager),  # nothing is copied
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
    )


for _factory, _made in ((local, run.LocalExecutor), (slurm, run.SlurmExecutor)):
    run.cli.factory(_factory, target=_made)  # executor=local, executor=slurm


def allocate(executor: run.Executor, config: TrainConfig) -> int:
    """Number of ranks that the executor starts, after filling in what it leaves open.

    Raises `UserError` if the layouts of `config` do not fit them.
    """
    fewest = config.fewest_ranks
    if isinstance(executor, run.LocalExecutor) and executor.ntasks_per_node == AS_NEEDED:
        executor.ntasks_per_node = config.world_size or _ranks_here(fewest)
    if isinstance(executor, run.SlurmExecutor):
        if executor.ntasks_per_node == AS_NEEDED:
            gpus = executor.gpus_per_node or _GPUS_A_NODE
            most = gpus - gpus % fewest if fewest < gpus else gpus  # multiple of the ranks that fit every layout
            executor.ntasks_per_node = min(config.world_size or most, most)
        if executor.nodes == AS_NEEDED:
            executor.nodes = math.ceil((config.world_size or fewest) / executor.nproc_per_node())
        executor.torchrun_nproc_per_node = executor.nproc_per_node()  # nemo-run forgets gpus_per_node otherwise
        if executor.gpus_per_node == AS_NEEDED:
            otherwise = executor.gpus_per_task or executor.gres
            executor.gpus_per_node = None if otherwise else executor.torchrun_nproc_per_node
    executor.launcher = executor.launcher or "torchrun"
    nodes, each = executor.nnodes(), executor.nproc_per_node()
    if nodes * each % fewest:
        raise UserError(
            f"{nodes} × {each} ranks (executor.nodes × executor.ntasks_per_node) do not fit the layouts: student "
            f"{_text(config.student)}, teacher {_text(config.teacher_grid)}, sampler tp={config.sampler.tp} need a "
            f"multiple of {fewest}"
        )
    return nodes * each


def _ranks_here(fewest: int) -> int:
    if importlib.util.find_spec("torch") is None:  # reported by `check_programs`, if it runs
        return fewest
    from megatron_trd import platform

    return platform.current().ranks(fewest)


def _text(part: StudentConfig | TeacherConfig) -> str:
    return f"tp={part.tp} pp={part.pp}" + (f" ep={part.ep}" if part.ep > 1 else "")


def place(executor: run.Executor, recipe: str, config: TrainConfig) -> None:
    """Make a SLURM job's ranks start in the working directory, and give them time to save when they stop.

    Raises `UserError` for relative paths if they cannot start there.
    """
    if not isinstance(executor, run.SlurmExecutor):
        return
    executor.env_vars.setdefault("PET_SHUTDOWN_TIMEOUT", "86400")  # of torchrun: seconds from SIGTERM to SIGKILL
    arguments = executor.srun_args or []
    chosen = any(argument.split("=")[0] == "--chdir" for argument in arguments)
    if shares_files(executor):
        arguments = arguments if chosen else [f"--chdir={Path.cwd()}", *arguments]
        _find_torchrun(executor)
    elif executor.container_image or not chosen:
        _check_absolute(recipe, config)
    # SLURM sees one task a node, torchrun, and might bind it to one core.
    executor.srun_args = ["--cpu-bind=none", *arguments]


def _check_absolute(recipe: str, config: TrainConfig) -> None:
    paths = {"model": config.model, "teacher.model": config.teacher.model}
    paths |= {"data.path": config.data.path, "run_dir": config.run_dir}
    paths |= {"recipe": recipe} if recipe.endswith((".yaml", ".yml")) else {}
    for key, path in paths.items():
        if path and not Path(path).is_absolute():
            raise UserError(
                f"{key} '{path}' is relative, and in a container or on another machine the ranks do not start in this "
                "folder: give the absolute path there (without a container: or executor.srun_args=['--chdir=/…'])"
            )


def shares_files(executor: run.Executor) -> bool:
    """Whether the ranks see the same files as this process."""
    if isinstance(executor, run.SlurmExecutor):
        return isinstance(executor.tunnel, run.LocalTunnel) and not executor.container_image
    return isinstance(executor, run.LocalExecutor)


def _find_torchrun(executor: run.Executor) -> None:
    """Put this interpreter's torchrun on the nodes' PATH: its environment may not be activated."""
    folder = Path(sys.executable).parent
    if "PATH" not in executor.env_vars and (folder / "torchrun").is_file():
        executor.env_vars["PATH"] = f"{shlex.quote(str(folder))}:$PATH"  # for a shell on the node


def launched(executor: run.Executor, task: run.Script) -> run.Script:
    """A task prefixed with torchrun if nemo-run would launch it incorrectly.

    nemo-run's own torchrun launcher quotes arguments for a shell, which a SLURM job's script is, but which a local job
    does not use: `run_dir='my run'` would keep its quotes.
    """
    if not isinstance(executor, run.LocalExecutor):
        return task
    executor.launcher = None
    arguments = ["--standalone", f"--nproc-per-node={executor.nproc_per_node()}", "-m", task.path, *task.args]
    return run.Script(path="torch.distributed.run", m=True, entrypoint=sys.executable, args=arguments)


def check_programs(executor: run.Executor) -> None:
    """Raise `UserError` if a program that starts the job from here is missing."""
    if isinstance(executor, run.SlurmExecutor) and isinstance(executor.tunnel, run.LocalTunnel):
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise UserError(f"no {program} here: submit from a SLURM login node, or use executor=local")
    if isinstance(executor, run.LocalExecutor) and importlib.util.find_spec("torch") is None:
        raise UserError("no torch here: install the training environment, or use another executor")


def has_accounting(executor: run.Executor) -> bool:
    """Whether nemo-run can query the job's state; on SLURM it uses only sacct for that."""
    if not isinstance(executor, run.SlurmExecutor):
        return True
    return bool(executor.tunnel.run("sacct --noheader --allocations --starttime=now", warn=True).ok)


def wait_for_job(executor: run.SlurmExecutor, job: str) -> str:
    """Final state of a job according to slurmctld, for clusters without accounting. Raises `UserError`."""
    while True:
        shown = executor.tunnel.run(f"scontrol show job --oneliner {job}", warn=True)
        state = re.search(r"\bJobState=(\w+)", shown.stdout)
        if state and state[1] in _ENDED:
            return state[1]
        if "Invalid job id" in shown.stderr:
            raise UserError(f"SLURM has forgotten job {job}: how it ended is to be seen in the run folder")
        time.sleep(_POLL_SECONDS)  # pending, running, or slurmctld too busy to answer


def output_folder(executor: run.Executor) -> str:
    """Folder of a launched job's output; on the cluster, where SLURM runs elsewhere."""
    return str(executor.job_details.folder if isinstance(executor, run.SlurmExecutor) else executor.job_dir)
