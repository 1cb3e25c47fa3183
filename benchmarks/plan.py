"""Forecast against measured: `megatron-trd plan --gpu cpu` and short runs on this machine.

    python -m benchmarks.plan --write benchmarks/results/plan_cpu.md
    python -m benchmarks.plan --recipes       # no runs: the table of docs/scaling.md

Two models: the embedded demo, where a step is mostly what the host does beside the arithmetic, and a random one of 42 M
parameters and 32,768 tokens, where it is mostly arithmetic. Each runs in several layouts. Forecasts are given the mean
lengths that the run had, and the machine's speed as it is measured just before. Times are medians over all steps but
the first, which starts engines; memory is the largest resident set of the first rank in any phase.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.common import machine, publish
from megatron_trd.config import TrainConfig, apply_overrides
from megatron_trd.data.problems import load_problems
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.demo import STUDENT
from megatron_trd.errors import UserError
from megatron_trd.methods import METHODS
from megatron_trd.models.folder import ModelFolder
from megatron_trd.planning.case import make_case
from megatron_trd.planning.devices import CPU, Cluster, find_cluster
from megatron_trd.planning.forecast import Forecast, forecast
from megatron_trd.planning.memory import GIB
from megatron_trd.planning.search import alternatives
from megatron_trd.planning.workload import Lengths, mean_lengths
from megatron_trd.reporting.metrics import read_metrics
from megatron_trd.reporting.progress import PHASES
from recipes.common import find_recipe, recipe_names

LAYOUTS = {
    "TP 1": ["world_size=1", "student.tp=1"],
    "TP 2": ["world_size=2", "student.tp=2"],
    "PP 2": ["world_size=2", "student.tp=1", "student.pp=2"],
    "DP 2": ["world_size=2", "student.tp=1"],
    "TP 2, recomputed": ["world_size=2", "student.tp=2", "student.recompute=true"],
}
RANDOM = ["batch_size=16", "data.overlong=cut", "student.micro_batch_size=4", "teacher.micro_batch_size=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", action="store_true", help="forecasts alone, of the recipes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--write", type=Path, help="also write the table here")
    options = parser.parse_args()
    text = recipes_table() if options.recipes else _against_measured(options.only, options.steps)
    publish("Forecasts" if options.recipes else "Forecast and measured on a CPU", text, options.write)


def recipes_table() -> str:
    """Every Qwen3 recipe on 1, 2 and 4 nodes of 8 H100, for docs/scaling.md."""
    header = ["recipe", "nodes", "fullest phase, GiB of 79.1", "s a step", "GPU-hours, 2,519 steps", "quickest layout"]
    names = [name for name in recipe_names() if "_qwen3_" in name]
    rows = [[f"`{name}`", str(nodes), *_of_recipe(name, nodes)] for name in names for nodes in (1, 2, 4)]
    return _markdown([header, ["---"] + ["---:"] * 5, *rows])


def _of_recipe(name: str, nodes: int) -> list[str]:
    config = find_recipe(name)
    try:
        case = make_case(config, find_cluster("h100", nodes, 8), mean_lengths(config))
    except UserError as error:
        return [str(error), "", "", ""]
    found, [quickest, *_] = forecast(case), alternatives(case).fitting
    phase, peak = found.peak
    memory = f"{peak / GIB:.1f} ({phase})" if found.fits else f"{found.worst.over / GIB:.1f} GiB too many"
    return [memory, f"{found.step:.1f}", f"{found.gpu_hours:,.0f}", f"{quickest.step:.1f} s"]


def _against_measured(layouts: list[str], steps: int) -> str:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        random = _random_model(Path(folder, "random"))
        models = {"demo": [], f"random, {_millions(random)} M": [f"model={random}", *RANDOM]}
        rows = [["run", *(f"{phase}, s" for phase in PHASES), "step, s", "memory, GiB"], ["---", *["---:"] * 6]]
        rows += [
            _row(f"{name}, {layout}", [*LAYOUTS[layout], *overrides], steps, Path(folder, f"run-{name}-{layout}"))
            for name, overrides in models.items()
            for layout in layouts
        ]
    return f"{machine()}, torch {torch.__version__}, fp32. Each cell: forecast / measured.\n\n{_markdown(rows)}"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _row(name: str, overrides: list[str], steps: int, run_dir: Path) -> list[str]:
    print(f"{name} ...", file=sys.stderr)
    # Every pair is kept, so that prompt lengths can be computed.
    overrides = [*overrides, f"steps={steps}", f"run_dir={run_dir}", "log.tensorboard=false"]
    config = apply_overrides(find_recipe("opsd_demo"), overrides)
    assert config.world_size is not None
    cluster = find_cluster(CPU, 1, config.world_size)
    command = [sys.executable, "-m", "megatron_trd.cli", "train", "opsd_demo", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(run_dir)[1:]
    expected = _forecast(config, cluster, rows)
    seconds = {phase: sum(parts.values()) for phase, parts in expected.seconds.items()}
    cells = [_pair(seconds[phase], median(row[f"time/{phase}"] for row in rows)) for phase in PHASES]
    cells.append(_pair(expected.step, median(row["time/step"] for row in rows)))
    return [name, *cells, _pair(expected.peak[1] / GIB, max(row["memory/host_gib"] for row in rows))]


def _forecast(config: TrainConfig, cluster: Cluster, rows: list[dict[str, float]]) -> Forecast:
    """The forecast with the prompts of the data and the responses of the run."""
    rollout, response = (fmean(row[f"length/{kind}"] for row in rows) for kind in ("rollout", "refinement"))
    prompts = PromptBuilder.of(ModelFolder(config.model), config.data)
    problems = load_problems(config.data)[:200]
    context = METHODS[config.method].teacher_context
    student = fmean(len(prompts.ids("vanilla", problem.problem)) for problem in problems)
    teacher = fmean(len(prompts.ids(context, problem.problem, problem.reference, [])) for problem in problems)
    mean = Lengths(prompt=student, teacher_prompt=teacher + rollout, rollout=rollout, response=response)
    return forecast(make_case(config, cluster, mean))


def _random_model(folder: Path) -> Path:
    """An untrained Qwen3 model, with the demo's tokenizer and a far larger vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    demo = ModelFolder(STUDENT).config
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=demo.eos_token_id,
        pad_token_id=demo.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _millions(folder: Path) -> int:
    model = ModelFolder(folder)
    sizes = [torch.Size(info.shape).numel() for info in map(model.info, model.names()) if info is not None]
    return round(sum(sizes) / 1e6)


def _pair(expected: float, measured: float) -> str:
    return f"{expected:.2g} / {measured:.2g}"


if __name__ == "__main__":
    main()
