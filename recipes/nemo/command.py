"""The command line: nemo-run's own, with settings parsed and checked as by `megatron-trd train`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import invoke
import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint, RunContext
from nemo_run.cli.cli_parser import CLIException
from nemo_run.cli.config import ConfigSerializer

from megatron_trd.config import TrainConfig, apply_overrides, to_dict
from megatron_trd.errors import JobFailed, UserError, in_one_line
from megatron_trd.training.run_folder import check_run_folder
from recipes.common import find_recipe, recipe_names
from recipes.nemo import executors

_NAMESPACE = "recipes"  # of `nemorun recipes NAME …`
_NEMO_RUN = re.compile(r"(run\.)?(executor|plugins)[=.\[]|run\.")  # arguments of nemo-run; all others are settings


def task(recipe: str, *overrides: str) -> run.Script:
    """A recipe as a nemo-run task, for custom experiments: `experiment.add(task("opsd_demo"), executor=…)`."""
    arguments = [recipe, *overrides, "--resume"]  # so that a job requeued by SLURM continues
    return run.Script(path="megatron_trd.training.worker", m=True, entrypoint="python", args=arguments)


class RecipeContext(RunContext):
    """nemo-run's handling of one command, for a recipe."""

    detach: bool

    def cli_execute(self, fn: Callable[..., Any], args: list[str], entrypoint_type: Any = "experiment") -> None:
        """nemo-run's hook, called after it has parsed its options."""
        in_one_line(lambda: self._execute(fn.__name__, args), f"{_NAMESPACE}.{fn.__name__}")

    def _execute(self, name: str, args: list[str]) -> None:
        if self.direct or self.repl or self.load:
            raise UserError("--direct, --repl and --load are not for recipes: torchrun starts the ranks")
        recipe = self.yaml or self.factory or name
        overrides = [argument for argument in args if not _NEMO_RUN.match(argument)]
        config = find_recipe(recipe, overrides)
        self._choose_executor([argument for argument in args if _NEMO_RUN.match(argument)])
        ranks = executors.allocate(self.executor, config)
        if config.world_size != ranks:
            if any(override.startswith("world_size=") for override in overrides):
                raise UserError(f"world_size={config.world_size}, but the executor starts {ranks} ranks: leave one out")
            overrides.append(f"world_size={ranks}")
            config = apply_overrides(config, overrides[-1:])
        executors.place(self.executor, recipe, config)
        script = executors.launched(self.executor, task(recipe, *overrides))
        if self.to_yaml or self.to_json or self.to_toml:
            self._export(config)
        elif self.dryrun:
            self._print_script(name, script)
            self._check(config, ranks)
        else:
            self._check(config, ranks)
            if self._confirmed(script):
                self._run(name, script)

    def _choose_executor(self, args: list[str]) -> None:
        """Build `self.executor` and `self.plugins` from nemo-run's arguments."""
        args = [argument.removeprefix("run.") for argument in args]
        named = any(argument.startswith("executor=") for argument in args)
        logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)  # it also raises what it logs
        try:
            self.parse_args(args if named else ["executor=local", *args])
        except CLIException as error:
            reason, *_ = re.split(r" exists for | \(Argument: ", str(error.__cause__ or error))
            raise UserError(f"executor and run arguments: {reason}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"executor and run arguments: {error}") from None

    def _export(self, config: TrainConfig) -> None:
        for form in ("yaml", "json", "toml"):
            path = getattr(self, f"to_{form}")
            if path:
                ConfigSerializer().dump_dict(to_dict(config), path, format=form)
                print(path)

    def _check(self, config: TrainConfig, ranks: int) -> None:
        """Run all checks that are possible on this machine. Raises `UserError`."""
        executors.check_programs(self.executor)
        if not executors.shares_files(self.executor):
            return
        try:
            from megatron_trd.training.command import check_start
        except ModuleNotFoundError as error:  # on a login node without the training environment
            if error.name is None or error.name.startswith(("megatron_trd", "recipes")):
                raise
            for key, path in (("model", config.model), ("teacher.model", config.teacher.model)):
                if path is not None and not Path(path).is_dir():
                    raise UserError(f"{key} '{path}': no such folder; give a local Hugging Face folder") from None
            check_run_folder(config, resume=True)
        else:
            check_start(config, ranks=ranks, resume=True)

    def _confirmed(self, script: run.Script) -> bool:
        run.dryrun_fn(run.Config(run.Script, **vars(script)), executor=self.executor)
        try:
            return self._should_continue(self.skip_confirmation)
        except typer.Abort:
            raise UserError("nobody to confirm it; add --yes") from None

    def _print_script(self, name: str, script: run.Script) -> None:
        """Print what would be run: the command, on SLURM the batch script for `sbatch`; else nemo-run's description."""
        if isinstance(self.executor, run.LocalExecutor):
            print(shlex.join(script.to_command(with_entrypoint=True)), file=sys.__stdout__)
            return
        on_slurm = isinstance(self.executor, run.SlurmExecutor)
        with run.Experiment(self.name, executor=self.executor) as experiment:
            experiment.add(script, name=name, plugins=self.plugins)
            experiment.dryrun(log=not on_slurm, delete_exp_dir=not on_slurm)
        if on_slurm:
            executor = experiment.jobs[0].executor
            batch = Path(executor.experiment_dir) / f"{executor.job_name}_sbatch.sh"
            print(batch.read_text(), file=sys.__stdout__)
            shutil.rmtree(executor.experiment_dir)

    def _run(self, name: str, script: run.Script) -> None:
        """Launch, and wait unless --detach. Raises `UserError` if it cannot be launched or does not end well."""
        wait = not self.detach or isinstance(self.executor, run.LocalExecutor)  # nemo-run does not detach from those
        accounting = executors.has_accounting(self.executor)
        self.detach = self.detach or not accounting  # nemo-run would fail to wait, and cancel the job after a minute
        try:
            with run.Experiment(self.name, executor=self.executor, skip_status_at_exit=not accounting) as experiment:
                experiment.add(script, name=name, plugins=self.plugins)
                self.launch(experiment)
        except invoke.exceptions.UnexpectedExit as error:
            raise JobFailed("; ".join(error.result.stderr.split("\n")).strip("; ")) from None
        if not wait:
            return
        job = experiment.jobs[0]
        number = job.handle.rpartition("/")[2]
        state = job.state.name if accounting else executors.wait_for_job(job.executor, number)
        where = executors.output_folder(job.executor)
        if state not in ("SUCCEEDED", "COMPLETED"):
            raise JobFailed(f"{state}, see {where}")
        print(f"{name}: {state}, output in {where}")


def _entrypoint(name: str) -> Entrypoint[..., Any]:
    """nemo-run's entry point of a recipe."""

    def recipe() -> TrainConfig:
        return find_recipe(name)

    recipe.__name__ = name
    title = importlib.import_module(f"recipes.{name}").__doc__
    help_text = (
        f"{title}\n\nkey=value: a setting of megatron_trd/config.py. executor=NAME, executor.key=value: where it runs."
    )
    run.cli.entrypoint(recipe, namespace=_NAMESPACE, type="experiment", run_ctx_cls=RecipeContext, help=help_text)
    entry: Entrypoint[..., Any] = recipe.cli_entrypoint  # type: ignore[attr-defined]
    return entry


_ENTRYPOINTS = {name: _entrypoint(name) for name in recipe_names()}


def main(name: str) -> None:
    """`python -m recipes.NAME`. A dry run prints the script and nothing else to standard output."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    _ENTRYPOINTS[name].cli(app)
    quiet = contextlib.redirect_stdout(sys.stderr) if "--dryrun" in sys.argv else contextlib.nullcontext()
    with quiet:
        app()
