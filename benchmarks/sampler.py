"""Streamed sampling beside sampling in two phases, on lengths with a long tail.

    python -m benchmarks.sampler --write benchmarks/results/sampler_cpu.md
    python -m benchmarks.sampler --ranks 1 --write benchmarks/results/sampler_h100.md  # on one GPU

Models of random weights sample `--problems` rollouts and one refinement of each, on `--ranks` ranks, in three ways: in
two phases with an engine a rank (as with `sampler.one_engine`, but without the refit in between), streamed with an
engine a rank (a live teacher), and streamed with two, one for each kind (a teacher with weights of its own).
Lengths are drawn from log-normal distributions of median 64 tokens, at most `--longest`, and forced. How much streaming
can save depends on

- the tail, and where the longest happen to be: there are two tails and `--draws` of each;
- the engine: what a step costs however little it does is saved, what each request in it costs is not. On a GPU a step
  of few requests takes about as long as one of many; on a CPU's core it does so for a small model only. So there are
  two models, and a step's time with 1 and with 16 requests stands beside the results;
- whether a refinement's length is *independent* of its rollout's or the *same*: the longest chain is twice the longest
  rollout then, and as long in either way;
- whether `--sequences` run at once in an engine, which is fewer than there are, or all.

Every draw is sampled in all ways, in turn, and all must give the same tokens in float32. In bf16, on a GPU, a batch's
size can change a token; lengths are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from benchmarks.common import machine, on_a, publish
from megatron_trd import platform
from megatron_trd.engines.work import Kind, Task, name_of
from tests.distributed import run_ranks
from tests.models import write_model

SHAPE: dict[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = SHAPE | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}
LARGE = SHAPE | {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 64,
    "vocab_size": 16000,
}


Way = Literal["two phases", "streamed", "two engines"]


class Case(NamedTuple):
    """A distribution of lengths, and whether fewer requests run at once than there are."""

    kind: str
    sigma: float  # of the logarithm of a length
    few: bool

    def lengths(self, problems: int, longest: int, draw: int) -> dict[str, int]:
        """Tokens of each request, by its task's name."""
        source, found = random.Random(draw), {}
        for index in range(problems):
            for name in get_args(Kind):
                length = round(source.lognormvariate(math.log(64), self.sigma))
                found[name_of(name, index)] = min(longest, max(1, length))
            if self.kind == "the same":
                found[name_of("refinement", index)] = found[name_of("rollout", index)]
        return found

    def bound(self, problems: int, longest: int, draw: int) -> float:
        """The longest rollout with its refinement, over the longest rollout and the longest refinement.

        Streamed over two phases if all steps took the same time, and there were room for all requests.
        """
        forced = self.lengths(problems, longest, draw)
        rollouts, refinements = (
            [forced[name_of(kind, index)] for index in range(problems)] for kind in ("rollout", "refinement")
        )
        return max(map(sum, zip(rollouts, refinements, strict=True))) / (max(rollouts) + max(refinements))


TAILS = (0.9, 1.4)
FEW = [Case("independent", sigma, True) for sigma in TAILS]
CASES = [*FEW, *(Case("independent", sigma, False) for sigma in TAILS), Case("the same", TAILS[1], True)]
MODELS = {"small": (SMALL, CASES), "large": (LARGE, FEW)}
STEPS = (32, 96)  # two lengths; the difference of their times gives the time of a step


class _Bench:
    """This rank's engines, forced to sample as many tokens of each request as a case specifies."""

    def __init__(self, folder: str, options: argparse.Namespace) -> None:
        from megatron_trd.config import from_dict
        from megatron_trd.data.problems import Problem
        from megatron_trd.engines import engine as module
        from megatron_trd.models.model import open_model

        self.options, self.config, opened = options, from_dict({"model": folder}, "benchmark"), open_model(folder)
        longest = 2 * options.longest + 64
        self.engine, self.second = (module.Engine(opened, self.config, longest, alone=False) for _ in range(2))
        for engine in (self.engine, self.second):
            engine.refit(opened.source)
        self.problems = [Problem(index, "", None, None) for index in range(options.problems)]
        self.prompts = [[2 + (7 * index + place) % 1000 for place in range(32)] for index in range(options.problems)]
        self._forced: dict[str, int] = {}
        add, parameters = module.Engine.add, module._parameters

        def add_forced(engine: module.Engine, task: Task, *rest: Any) -> None:
            add(engine, dataclasses.replace(task, limit=self._forced[task.name]), *rest)

        def to_the_limit(*arguments: Any) -> Any:
            found = parameters(*arguments)
            found.ignore_eos = True  # which random weights draw once in several thousand tokens
            return found

        module._parameters = to_the_limit  # type: ignore[assignment]
        module.Engine.add = add_forced  # type: ignore[assignment,method-assign]

    def run(self, forced: dict[str, int], way: Way, few: bool) -> tuple[float, list[Any], dict[str, float]]:
        """Seconds, trajectories, and the sampler's statistics."""
        most = self.options.sequences if few else self.config.sampler.max_sequences
        return self._sample(forced, len(self.problems), way, most, lambda _, rollout: [5, *rollout.tokens, 6])

    def step(self, requests: int) -> float:
        """Seconds of an engine's step with this many requests in it, all engines at once."""
        seconds = []
        for length in STEPS:
            forced = {name_of("rollout", index): length for index in range(self.options.ranks * requests)}
            seconds.append(min(self._sample(forced, len(forced), "streamed", requests, None)[0] for _ in range(3)))
        return (seconds[1] - seconds[0]) / (STEPS[1] - STEPS[0])

    def _sample(
        self, forced: dict[str, int], problems: int, way: Way, most: int, refine: Any
    ) -> tuple[float, list[Any], dict[str, float]]:
        from megatron_trd.engines.sampler import Sampler

        self._forced = forced
        settings = dataclasses.replace(self.config.sampler, stream=way != "two phases", max_sequences=most)
        teacher = self.second if way == "two engines" else self.engine
        sampler = Sampler(dataclasses.replace(self.config, sampler=settings), self.engine, teacher)
        dist.barrier()
        begin = time.perf_counter()
        found = sampler.sample(0, self.problems[:problems], self.prompts[:problems], refine)
        return time.perf_counter() - begin, found, sampler.stats


class Draw(NamedTuple):
    """One list of lengths, sampled in all ways."""

    seconds: dict[Way, float]
    stats: dict[str, float]  # of the sampler, streamed
    tokens: int


class Found(NamedTuple):
    """Results of one model."""

    steps: dict[int, float]  # seconds of a step, by number of requests in it
    draws: list[list[Draw]]  # of each case


def measure(rank: int, world: int, folder: str, cases: list[Case], options: argparse.Namespace) -> Found:
    """Rank function: every draw of each case."""
    platform.current().set_up()
    bench = _Bench(folder, options)
    bench.step(1)  # the engine packs its weights on first use
    steps = {requests: bench.step(requests) for requests in (1, options.sequences)}
    return Found(steps, [[_draw(bench, case, draw, rank == 0) for draw in range(options.draws)] for case in cases])


def _draw(bench: _Bench, case: Case, number: int, show: bool) -> Draw:
    forced = case.lengths(bench.options.problems, bench.options.longest, number)
    order = get_args(Way) if number % 2 == 0 else get_args(Way)[::-1]
    ways = {way: bench.run(forced, way, case.few) for way in order}
    tokens = [
        [(one.rollout.tokens, one.refinement and one.refinement.tokens) for one in found]
        for _, found, _ in ways.values()
    ]
    if platform.current().dtype == torch.float32 and any(other != tokens[0] for other in tokens[1:]):
        raise RuntimeError("two ways of sampling gave different tokens")
    sampled = sum(len(rollout) + len(refined or ()) for rollout, refined in tokens[0])
    seconds = {way: took for way, (took, _, _) in ways.items()}
    if sampled != sum(forced.values()):
        raise RuntimeError(f"{sampled} tokens were sampled, {sum(forced.values())} were to be")
    if show:
        print(
            f"{case}, draw {number}: " + ", ".join(f"{way} {took:.1f} s" for way, took in seconds.items()), flush=True
        )
    return Draw(seconds, ways["streamed"][2], sampled)


def _table(shape: dict[str, Any], cases: list[Case], options: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sampler-") as folder:
        current = platform.current()
        write_model(Path(folder), dtype=current.dtype, **shape)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / current.dtype.itemsize / 1e6
        found = run_ranks(measure, options.ranks, folder, cases, options, timeout=3 * 3600, backend=current.backend)[0]
    steps = ", ".join(f"{1000 * seconds:.1f} ms with {count}" for count, seconds in found.steps.items())
    yield f"\n## {size:.1f} million parameters\n\nA step of an engine takes {steps} requests in it.\n"
    yield (
        "| refinement's length | sigma | nine of ten below | longest | at once | tokens | two phases, s | "
        "streamed, s | streamed / two phases | longest chains' | idle | idle while requests wait | two engines, s | "
        "two engines / two phases |"
    )
    yield "|---|" + "---:|" * 13
    for case, draws in zip(cases, found.draws, strict=True):
        yield _row(case, draws, options)


def _row(case: Case, draws: list[Draw], options: argparse.Namespace) -> str:
    drawn = (case.lengths(options.problems, options.longest, number) for number in range(options.draws))
    lengths = sorted(length for forced in drawn for length in forced.values())
    tokens = fmean(draw.tokens for draw in draws)
    seconds: dict[Way, float] = {way: fmean(draw.seconds[way] for draw in draws) for way in get_args(Way)}

    def of_two_phases(way: Way) -> str:
        ratios = ", ".join(f"{draw.seconds[way] / draw.seconds['two phases']:.2f}" for draw in draws)
        return f"**{seconds[way] / seconds['two phases']:.2f}** ({ratios})"

    bounds = ", ".join(
        f"{case.bound(options.problems, options.longest, number):.2f}" for number in range(options.draws)
    )
    idle, queued = (100 * fmean(draw.stats[f"sampler/{key}"] for draw in draws) for key in ("idle", "idle_queued"))
    return (
        f"| {case.kind} | {case.sigma} | {lengths[len(lengths) * 9 // 10]} | {lengths[-1]} | "
        f"{options.sequences if case.few else 'all'} | {tokens:,.0f} | {seconds['two phases']:.1f} | "
        f"{seconds['streamed']:.1f} | {of_two_phases('streamed')} | {bounds} | {idle:.1f} % | {queued:.1f} % | "
        f"{seconds['two engines']:.1f} | {of_two_phases('two engines')} |"
    )


def main() -> None:
    """Measure, print the table, and write it if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1280, help="tokens of a rollout or refinement")
    parser.add_argument("--sequences", type=int, default=16, help="running at once in an engine")
    parser.add_argument("--draws", type=int, default=3, help="of the lengths of each case")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.problems < (least := options.ranks * options.sequences):
        parser.error(f"--problems: at least {least}, or no engine has --sequences at once")
    current = platform.current()
    dtype, device = str(current.dtype).removeprefix("torch."), current.device.type
    text = "\n".join(
        [
            f"{machine(device)}, torch {torch.__version__}, {dtype}; {options.problems} problems, a rollout and a "
            f"refinement each, on {options.ranks} ranks. Log-normal lengths of median 64 tokens; "
            f"means over {options.draws} draws, each draw's ratio in brackets, and beside it what it is of the longest "
            "chain alone: the longest rollout with its refinement, over the longest rollout and the longest "
            f"refinement. All ways gave the same {'tokens' if current.dtype == torch.float32 else 'lengths'}.",
            *(row for model in options.models for row in _table(*MODELS[model], options)),
        ]
    )
    publish(f"Sampling {on_a(device)}", text, options.write)


if __name__ == "__main__":
    main()
