"""`megatron-trd demo`: the embedded model before and after TRD and after the raw-rollout baseline, and a report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_trd.config import MethodName, TrainConfig
from megatron_trd.demo import TEST_PROBLEMS
from megatron_trd.demo.task import DemoProblem, first_wrong_step
from megatron_trd.errors import UserError
from megatron_trd.evaluation.command import run_evaluation
from megatron_trd.reporting.report import write_report
from megatron_trd.training.checkpoint import checkpoints
from megatron_trd.training.checks import check
from megatron_trd.training.command import run_training
from recipes.common import find_recipe

# The paper's first baseline: the same divergence on raw rollouts, with the teacher context without a rollout.
METHODS: dict[str, tuple[str, MethodName, MethodName]] = {
    "trd-opsd": ("opsd_demo", "trd-opsd", "opsd-forward-kl"),
    "trd-opd": ("opd_demo", "trd-opd", "opd-forward-kl"),
}
_OPTIONS = ("method=", "run_dir=", "seed=")
SAMPLES = 16  # responses per problem
PAIRS = 3


def run_demo(method: str, out: Path, seed: int, overrides: Sequence[str] = (), problems: Path = TEST_PROBLEMS) -> Path:
    """Compare base, TRD and baseline, from the same start and for as many steps. Returns the path of `report.html`.

    Writes `summary.json`, `report.html` and each run's folder into `out`, replacing an earlier demo; raises `UserError`
    if `out` holds anything else.
    """
    if method not in METHODS:
        raise UserError(f"demo --method {method}: choose one of {', '.join(METHODS)}")
    for override in overrides:
        if override.startswith(_OPTIONS):
            raise UserError(f"override '{override}': the demo has options for it, see megatron-trd demo --help")
    recipe, *names = METHODS[method]
    base = find_recipe(recipe, [*overrides, f"seed={seed}"])
    base = dataclasses.replace(base, world_size=check(base).world_size)
    _clear(out)  # last: bad input must not delete an earlier demo
    begin = time.perf_counter()
    summary: dict[str, Any] = {
        "task": "held-out problems of the embedded world",
        "samples": SAMPLES,
        "seeds": [seed],
        "steps": base.steps,
        "results": {"base": _evaluate("base", Path(base.model), base, out, problems)},
    }
    for name in names:
        config = dataclasses.replace(base, method=name, run_dir=str(out / name))
        summary["results"][name] = _train_and_evaluate(config, out, problems)
    summary["problems"] = summary["results"]["base"]["problems"]
    summary["seconds"] = time.perf_counter() - begin
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    runs: dict[str, Path] = {name: out / name for name in names}
    report = out / "report.html"
    title = "Trajectory-refined distillation of the embedded model"
    write_report(report, runs, title=title, scores=summary, pairs=_pairs(out / method))
    _print(summary, report)
    return report


def _clear(out: Path) -> None:
    """Make `out` an empty folder; only an earlier demo may be deleted for it."""
    mark = out / "demo.marker"
    if out.is_dir() and any(out.iterdir()) and not mark.is_file():
        raise UserError(f"folder '{out}' holds something else than a demo: give another one with --out")
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        mark.write_text("This folder is made anew by each `megatron-trd demo`.\n")
    except OSError as error:
        raise UserError(f"folder '{out}' cannot be written: {error.strerror}; give another one with --out") from None


def _train_and_evaluate(config: TrainConfig, out: Path, problems: Path) -> dict[str, Any]:
    print(f"\n{config.method}: {config.steps} steps of {config.batch_size} problems", flush=True)
    begin = time.perf_counter()
    done = run_training(config)
    if done < config.steps:
        raise UserError(f"the demo was stopped at step {done} of {config.steps} of {config.method}")
    seconds = time.perf_counter() - begin
    result = _evaluate(config.method, checkpoints(config.run_dir)[done], config, out, problems)
    return result | {"train_seconds": seconds}


def _evaluate(name: str, model: Path, config: TrainConfig, out: Path, problems: Path) -> dict[str, Any]:
    """Scores of a model, with the number of ranks and the response length that `config` trains with."""
    begin = time.perf_counter()
    settings = [
        f"world_size={config.world_size}",
        f"sampler.max_rollout_tokens={config.sampler.max_rollout_tokens}",
    ]
    scores = run_evaluation(model, str(problems), SAMPLES, out / "evaluation" / name, config.seed, settings)
    kept = {key: value for key, value in scores.items() if key.startswith(("avg@", "pass@"))}
    result = kept | {"problems": scores["problems"], "seeds": [config.seed], "seconds": time.perf_counter() - begin}
    print(f"{name}: avg@{SAMPLES} {result[f'avg@{SAMPLES}']['value']:.1%}", flush=True)
    return result


def _pairs(run: Path) -> list[dict[str, Any]]:
    """The run's first failed rollouts and their refinements, with the first wrong line of each."""
    found: list[dict[str, Any]] = []
    for file in sorted((run / "samples").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            pair = json.loads(line)
            if pair["rollout_right"] or not pair["refinement"] or len(found) == PAIRS:
                continue
            problem = DemoProblem(pair["problem"], pair["answer"], pair["reference"])
            found.append(pair | {"first_wrong_line": first_wrong_step(problem, pair["rollout"])})
    return found


def _print(summary: dict[str, Any], report: Path) -> None:
    table = Table("method", f"avg@{SAMPLES}", "95 % interval", f"pass@{SAMPLES}", "training", title_justify="left")
    table.title = f"{summary['problems']} held-out problems, {SAMPLES} samples each"
    for name, result in summary["results"].items():
        average, passed = result[f"avg@{SAMPLES}"], result[f"pass@{SAMPLES}"]
        interval = f"{average['low']:.1%} to {average['high']:.1%}"
        training = f"{result['train_seconds']:.0f} s" if "train_seconds" in result else ""
        table.add_row(name, f"{average['value']:.1%}", interval, f"{passed['value']:.1%}", training)
    console = Console()
    console.print(table)
    console.print(f"{summary['seconds']:.0f} s; report: {report}", soft_wrap=True)
