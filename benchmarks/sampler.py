"""Streamed sampling beside sampling in two phases, on lengths with a long tail.

    python -m benchmarks.sampler --write benchmarks/results/sampler_cpu.md

A model of random weights and 31 million parameters samples `--problems` rollouts and one refinement of each, on two
ranks with an engine each. Lengths are drawn from a log-normal distribution (median 64 tokens, sigma 0.9, at most
`--longest`) and forced; each case runs in both ways, in turn, `--repeats` times, and both must give the same tokens.

- *independent*: a refinement's length does not depend on its rollout's;
- *as its rollout*: it is the same, so that the longest chain is twice the longest rollout, which bounds what streaming
  can save.

Two limits: `--sequences` running at once in an engine, which is fewer than there are, or all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform as machine
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.models import write_model

RANKS = 2
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
CASES = [(kind, few) for kind in ("independent", "as its rollout") for few in (True, False)]


def lengths(problems: int, longest: int, kind: str) -> dict[str, int]:
    """Tokens of each request, by its task's name."""
    draw = random.Random(0)
    found = {}
    for index in range(problems):
        for name in ("rollout", "refinement"):
            length = min(longest, max(1, round(draw.lognormvariate(4.16, 0.9))))
            found[f"{name}/{index}/0"] = length
        if kind == "as its rollout":
            found[f"refinement/{index}/0"] = found[f"rollout/{index}/0"]
    return found


def measure(rank: int, world: int, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rank function: for each case, seconds in both ways and what the sampler says of itself."""
    from megatron_trd import platform
    from megatron_trd.config import from_dict
    from megatron_trd.data.problems import Problem
    from megatron_trd.engines import engine as module
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.sampler import Sampler
    from megatron_trd.models.model import open_model

    platform.current().set_up()
    config = from_dict({"model": folder}, "benchmark")
    opened = open_model(folder)
    engine = Engine(opened, config, max_length=2 * options.longest + 64)
    engine.refit(opened.source)
    problems = [Problem(index, "", None, None) for index in range(options.problems)]
    prompts = [[2 + (7 * index + place) % 1000 for place in range(32)] for index in range(options.problems)]
    add, parameters = engine.add, module._parameters

    def to_the_limit(*arguments: Any) -> Any:
        found = parameters(*arguments)
        found.ignore_eos = True  # which random weights draw once in so many thousand tokens
        return found

    module._parameters = to_the_limit

    def run(forced: dict[str, int], stream: bool, few: bool) -> tuple[float, list[Any], dict[str, float]]:
        engine.add = lambda task, *rest: add(  # type: ignore[method-assign]
            dataclasses.replace(task, limit=forced[task.name]), *rest
        )
        most = options.sequences if few else config.sampler.max_sequences
        settings = dataclasses.replace(config.sampler, stream=stream, max_sequences=most)
        sampler = Sampler(dataclasses.replace(config, sampler=settings), engine, engine)
        dist.barrier()
        begin = time.perf_counter()
        found = sampler.sample(0, problems, prompts, lambda _, rollout: [5, *rollout.tokens, 6])
        return time.perf_counter() - begin, found, sampler.stats

    results = []
    for kind, few in CASES:
        forced = lengths(options.problems, options.longest, kind)
        times: dict[bool, list[float]] = {True: [], False: []}
        stats: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        tokens = []
        for _ in range(options.repeats):
            for stream in (True, False):
                seconds, found, said = run(forced, stream, few)
                times[stream].append(seconds)
                stats[stream].append(said)
                tokens.append([(one.rollout.tokens, one.refinement and one.refinement.tokens) for one in found])
        if any(other != tokens[0] for other in tokens):
            raise RuntimeError("streamed and two-phase sampling gave different tokens")
        sampled = sum(len(rollout) + len(refined or ()) for rollout, refined in tokens[0])
        if sampled != sum(forced.values()):
            raise RuntimeError(f"{sampled} tokens were sampled, {sum(forced.values())} were to be")
        results.append({"seconds": times, "stats": stats, "tokens": sampled})
    return results


def _rows(folder: str, options: argparse.Namespace) -> Iterator[str]:
    results = run_ranks(measure, RANKS, folder, options, timeout=3600)[0]
    for (kind, few), result in zip(CASES, results, strict=True):
        phases, streamed = (median(result["seconds"][stream]) for stream in (False, True))
        idle, queued = (
            median(stats[key] for stats in result["stats"][True]) for key in ("sampler/idle", "sampler/idle_queued")
        )
        yield (
            f"| {kind} | {options.sequences if few else 'all'} | {result['tokens']:,} | {phases:.1f} | "
            f"{streamed:.1f} | {streamed / phases:.2f} | {100 * idle:.1f} % | {100 * queued:.1f} % |"
        )


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--longest", type=int, default=640, help="tokens of a rollout or refinement")
    parser.add_argument("--sequences", type=int, default=16, help="running at once in an engine")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sampler-") as folder:
        write_model(Path(folder), **SHAPE)
        rows = list(_rows(folder, options))
    drawn = sorted(lengths(options.problems, options.longest, "independent").values())
    text = "\n".join(
        [
            "# Sampling on a CPU\n\n```",
            f"python -m benchmarks.sampler {shlex.join(sys.argv[1:])}\n```\n",
            f"{machine.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32; {options.problems} "
            f"problems, a rollout and a refinement each, on {RANKS} ranks; median of {options.repeats}. Lengths: "
            f"median {drawn[len(drawn) // 2]}, nine of ten below {drawn[len(drawn) * 9 // 10]}, longest "
            f"{drawn[-1]} tokens. "
            "Both ways gave the same tokens.\n",
            "| refinement's length | at once | tokens | two phases, s | streamed, s | streamed / two phases | idle | "
            "idle while requests wait |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
        ]
    )
    print(text)
    if options.write:
        options.write.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
