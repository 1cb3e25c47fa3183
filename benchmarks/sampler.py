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
from typing import Any, get_args

import torch
import torch.distributed as dist

from megatron_trd.engines.work import Kind, name_of
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
        for name in get_args(Kind):
            length = min(longest, max(1, round(draw.lognormvariate(4.16, 0.9))))
            found[name_of(name, index)] = length
        if kind == "as its rollout":
            found[name_of("refinement", index)] = found[name_of("rollout", index)]
    return found


class _Bench:
    """This rank's engine, made to sample as many tokens as a case wants of each request."""

    def __init__(self, folder: str, options: argparse.Namespace) -> None:
        from megatron_trd.config import from_dict
        from megatron_trd.data.problems import Problem
        from megatron_trd.engines import engine as module
        from megatron_trd.models.model import open_model

        self.options, self.config, opened = options, from_dict({"model": folder}, "benchmark"), open_model(folder)
        self.engine = module.Engine(opened, self.config, max_length=2 * options.longest + 64)
        self.engine.refit(opened.source)
        self.problems = [Problem(index, "", None, None) for index in range(options.problems)]
        self.prompts = [[2 + (7 * index + place) % 1000 for place in range(32)] for index in range(options.problems)]
        self._add, parameters = self.engine.add, module._parameters

        def to_the_limit(*arguments: Any) -> Any:
            found = parameters(*arguments)
            found.ignore_eos = True  # which random weights draw once in so many thousand tokens
            return found

        module._parameters = to_the_limit

    def run(self, forced: dict[str, int], stream: bool, few: bool) -> tuple[float, list[Any], dict[str, float]]:
        """Seconds, trajectories, and what the sampler says of itself."""
        from megatron_trd.engines.sampler import Sampler

        self.engine.add = lambda task, *rest: self._add(  # type: ignore[method-assign]
            dataclasses.replace(task, limit=forced[task.name]), *rest
        )
        most = self.options.sequences if few else self.config.sampler.max_sequences
        settings = dataclasses.replace(self.config.sampler, stream=stream, max_sequences=most)
        sampler = Sampler(dataclasses.replace(self.config, sampler=settings), self.engine, self.engine)
        dist.barrier()
        begin = time.perf_counter()
        found = sampler.sample(0, self.problems, self.prompts, lambda _, rollout: [5, *rollout.tokens, 6])
        return time.perf_counter() - begin, found, sampler.stats


def measure(rank: int, world: int, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rank function: for each case, seconds in both ways and what the sampler says of itself."""
    from megatron_trd import platform

    platform.current().set_up()
    bench = _Bench(folder, options)
    return [_case(bench, lengths(options.problems, options.longest, kind), few) for kind, few in CASES]


def _case(bench: _Bench, forced: dict[str, int], few: bool) -> dict[str, Any]:
    times: dict[bool, list[float]] = {True: [], False: []}
    stats: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    tokens = []
    for _ in range(bench.options.repeats):
        for stream in (True, False):
            seconds, found, said = bench.run(forced, stream, few)
            times[stream].append(seconds)
            stats[stream].append(said)
            tokens.append([(one.rollout.tokens, one.refinement and one.refinement.tokens) for one in found])
    if any(other != tokens[0] for other in tokens):
        raise RuntimeError("streamed and two-phase sampling gave different tokens")
    sampled = sum(len(rollout) + len(refined or ()) for rollout, refined in tokens[0])
    if sampled != sum(forced.values()):
        raise RuntimeError(f"{sampled} tokens were sampled, {sum(forced.values())} were to be")
    return {"seconds": times, "stats": stats, "tokens": sampled}


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
