"""The demo over several seeds: base, TRD and the raw-rollout baseline, mean and spread.

    python -m benchmarks.demo_seeds --seeds 0 1 2 --write benchmarks/results/demo_seeds.md

A seed decides the order of the problems and every sampled token, in training and in evaluation; the base model is the
same. Each row's interval is over seeds (mean ± standard deviation), not over problems.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import machine, publish
from megatron_trd.demo.run import METHODS, SAMPLES, run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default="trd-opsd")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--write", type=Path, help="also write the table here")
    parser.add_argument("overrides", nargs="*", help="key=value of the training runs")
    options = parser.parse_intermixed_args()
    summaries = []
    for seed in options.seeds:
        out = options.out / options.method / str(seed)
        run_demo(options.method, out, seed, options.overrides)
        summaries.append(json.loads((out / "summary.json").read_text()))
    table = _table(summaries)
    publish("The demo over seeds", table, options.write)


def _table(summaries: list[dict[str, Any]]) -> str:
    first = summaries[0]
    seeds = [summary["seeds"][0] for summary in summaries]
    lines = [
        f"{first['problems']} held-out problems, {SAMPLES} samples each, {first['steps']} steps, seeds "
        f"{', '.join(map(str, seeds))}; {machine()}. A whole demo took "
        f"{mean(summary['seconds'] for summary in summaries):.0f} s.",
        "",
        f"| avg@{SAMPLES} | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± sd | pass@{SAMPLES} | train, s |",
        "|---|" + "---:|" * (len(seeds) + 3),
    ]
    for name in first["results"]:
        results = [summary["results"][name] for summary in summaries]
        averages = [100 * result[f"avg@{SAMPLES}"]["value"] for result in results]
        passed = mean(100 * result[f"pass@{SAMPLES}"]["value"] for result in results)
        spread = f" ± {stdev(averages):.1f}" if len(averages) > 1 else ""
        seconds = f"{mean(result['train_seconds'] for result in results):.0f}" if name != "base" else ""
        cells = " | ".join(f"{value:.1f} %" for value in averages)
        lines.append(f"| {name} | {cells} | {mean(averages):.1f}{spread} % | {passed:.1f} % | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
