"""The command line: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_trd.errors import in_one_line

_STOPPED = 130  # exit code of a command that was interrupted, by a shell's convention

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe of recipes/, or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. optimizer.lr=1e-5")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint of the run folder")] = False,
    verify_refit: Annotated[bool, typer.Option(help="compare every tensor's checksum after each refit")] = False,
    verify_logprobs: Annotated[
        float | None, typer.Option(help="stop if sampler and trainer differ by more nats a token, e.g. 1e-3")
    ] = None,
) -> None:
    """Train a recipe on this machine."""
    from megatron_trd.training.command import run_training
    from recipes.common import find_recipe

    extra = ["log.verify_refit=true"] if verify_refit else []
    extra += [f"log.max_drift={verify_logprobs}"] if verify_logprobs is not None else []
    config = find_recipe(recipe, [*(overrides or []), *extra])
    done = run_training(config, resume=resume)
    print(f"{done} steps done, run folder {config.run_dir}", end="")
    if done < config.steps:
        print(f"; stopped before step {config.steps}, add --resume to go on")
        raise typer.Exit(_STOPPED)
    print()


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="a recipe of recipes/, or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. student.tp=2")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="of the job; left out: the fewest that fit")] = None,
    resume: Annotated[bool, typer.Option(help="the run folder may hold this run already")] = False,
) -> None:
    """Check that a recipe can start: its settings, model, data, layout and run folder."""
    from megatron_trd.training.command import check_start, describe
    from recipes.common import find_recipe

    config = find_recipe(recipe, overrides or [])
    inputs = check_start(config, ranks=ranks, resume=resume)
    print(f"ready: {describe(config, ranks or inputs.world_size)}")


@app.command()
def demo(
    method: Annotated[
        str, typer.Option(help="trd-opsd (self-distillation) or trd-opd (a larger teacher)")
    ] = "trd-opsd",
    out: Annotated[Path, typer.Option(help="folder of the demo's runs and report")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="of sampling and data order")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the training runs, e.g. steps=20")] = None,
) -> None:
    """Distil the embedded model, evaluate it before and after, and write a report."""
    from megatron_trd.demo.run import run_demo

    run_demo(method, out, seed, overrides or [])


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Option(help="Hugging Face folder, or a run's checkpoints/step_N")],
    data: Annotated[str, typer.Option(help="JSONL or parquet file, datasets folder or hub name")],
    samples: Annotated[int, typer.Option(min=1, help="responses a problem; avg@k and pass@k are for k = samples")] = 16,
    out: Annotated[Path | None, typer.Option(help="folder for responses.jsonl and scores.json")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of sampling and of the bootstrap")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value: sampler.…, data.… and world_size")] = None,
) -> None:
    """Score a model: avg@k and pass@k with 95 % intervals."""
    from megatron_trd.evaluation.command import print_scores, run_evaluation

    print_scores(run_evaluation(model, data, samples, out, seed, overrides or []))


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(help="e.g. aime_2025; left out: prints all names")] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file; left out: data/NAME.jsonl")] = None,
) -> None:
    """Fetch the paper's evaluation sets, and TACO, from the hub."""
    from megatron_trd.data.published import PUBLISHED
    from megatron_trd.data.published import fetch as fetch_problems

    if name:
        print(fetch_problems(name, out or Path("data") / f"{name}.jsonl"))
    else:
        print("\n".join(PUBLISHED))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="a recipe of recipes/, or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. student.tp=2")] = None,
    nodes: Annotated[int, typer.Option(help="of the job")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="each runs one rank")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100-80g, b200, or cpu: this machine, measured")] = "h100",
    mean_response: Annotated[int | None, typer.Option(help="tokens expected; left out: half of the limit")] = None,
) -> None:
    """Forecast a recipe's memory and time on GPUs, and which layouts fit; exit code 1 if its own does not."""
    from megatron_trd.planning.command import run_plan
    from recipes.common import find_recipe

    config = find_recipe(recipe, overrides or [])
    fits = run_plan(recipe, config, gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node, mean_response=mean_response)
    raise typer.Exit(0 if fits else 1)


@app.command()
def report(run_dirs: Annotated[list[Path], typer.Argument(help="folders of training runs, to be compared")]) -> None:
    """Write report.html of a run into its folder, or of several into the folder that holds them."""
    from megatron_trd.reporting.report import report_runs

    print(report_runs(run_dirs))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="also check this recipe's model, data and disk")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="started here; left out: one a GPU, two on a CPU")] = None,
    quick: Annotated[bool, typer.Option(help="in seconds: measure neither bandwidth nor the disk's speed")] = False,
    timeout: Annotated[int, typer.Option(min=1, help="seconds that a rank or a file system has to answer")] = 60,
) -> None:
    """Check this node before a job; under torchrun or srun, all nodes and the network between them."""
    from megatron_trd.doctor import prepare
    from recipes.common import find_recipe

    prepare()
    from megatron_trd.doctor.command import run_doctor

    config = find_recipe(recipe, overrides or []) if recipe else None
    raise typer.Exit(run_doctor(config, ranks=ranks, quick=quick, seconds=timeout))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def convert(context: typer.Context) -> None:
    """Hugging Face folder <-> Megatron distributed checkpoint: hf-to-megatron, megatron-to-hf, verify."""
    from checkpoint_tools.common import tools

    tools()(args=context.args, prog_name="megatron-trd convert")


def main() -> None:
    """Entry point."""
    in_one_line(app, "megatron-trd")


if __name__ == "__main__":
    main()
