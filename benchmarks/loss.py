"""Time, peak memory and gradient error of the fused loss, beside its floor and the public rivals.

    pip install --no-deps -r benchmarks/requirements.txt  # the rivals; those missing are left out
    python -m benchmarks.loss --write benchmarks/results/loss_cpu.md
    python -m benchmarks.loss --tp 2
    python -m benchmarks.loss --sweep

The floor is the four products no head can do without (student logits, teacher logits, gradients of hidden states and
of weight), whole, into buffers already touched. It is measured first and last, and ratios are to the mean of the two,
so that a machine that changes its speed shows. Every case runs in fresh processes, one a tensor-parallel rank, on the
same tensors: after one call to warm up, `--repeats` timed ones, each as long as its slowest rank. Memory is the peak
of a rank above what it holds with the inputs and one gradient of each student input: resident bytes on a CPU (the
`VmHWM` of the process), allocated ones on a GPU. Ours is called as the trainer does, whose gradient of the head is a
float32 `main_grad` that lasts. A chunk is one side's float32 logits for the tokens of `--chunk-tokens` (default: at
most 320 MiB, on a GPU 640). Errors are norms relative to a float64 computation, on a small problem of its own.

In a sweep each point is measured beside its own four products, chunk by chunk and in turn: their work is linear in
everything, and what else the machine does happens to both.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from math import nan
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import (
    cores,
    held_bytes,
    kernel_bytes,
    machine,
    matches,
    on_a,
    peak_bytes,
    publish,
    relative_error,
)
from benchmarks.rivals import Case, Loss, cases, loaded
from megatron_trd.losses import dense_divergence
from megatron_trd.losses.head import chunks, chunks_under_way
from tests.distributed import run_ranks

MIB = 2**20
FLOOR, AGAIN = "four products alone", "four products alone, again"
SWEPT_TOKENS = [2**power for power in range(10, 17)]
SWEPT_VOCABULARIES = [2**power for power in range(13, 19)]
SWEPT_RANKS = [1, 2, 4]
SWEEPS = ["tokens", "vocabulary", "ranks"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """The shape of the problem, and the device."""

    tokens: int
    hidden: int
    vocabulary: int  # of all ranks
    ranks: int
    chunk_tokens: int | None
    device: str
    dtype: str

    @property
    def width(self) -> int:
        return self.vocabulary // self.ranks

    @property
    def chunk(self) -> int:
        """Bytes of one side's logits in a chunk, or in its two halves, which several ranks have in flight."""
        depth, device = chunks_under_way(self.ranks), torch.device(self.device)
        first, *_ = chunks(self.tokens, self.width, self.chunk_tokens, torch.float32, device, under_way=depth)
        return 4 * depth * first.stop * self.width


class Inputs(NamedTuple):
    """Inputs of every case; the student's two require gradients."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor


class Measured(NamedTuple):
    """Measurements of one rank, or of all ranks together."""

    seconds: list[float]
    memory: int
    gradient_error: float
    loss_error: float


class Beside(NamedTuple):
    """Measurements of one rank, of ours and of the products alone, in turn."""

    seconds: list[float]
    products: list[float]
    memory: int


def main() -> None:
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    if options.device == "cuda" and options.tp > 1:
        raise SystemExit("one GPU is measured: --device cuda goes with --tp 1")
    table = _sweep(options) if options.sweep is not None else _comparison(options)
    text = f"{_machine(options)}\n\n{table}"
    publish(f"The loss {on_a(options.device)}", text, options.write)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, help="default: 151936; of a sweep over tokens, 16384")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--chunk-tokens", type=int, help="of ours; the rivals keep their defaults")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of hidden states and weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases with one of these in their names")
    parser.add_argument("--sweep", nargs="*", choices=SWEEPS, help="how ours grows with these; alone: with all")
    parser.add_argument("--write", type=Path, help="also write the table here")
    return parser


def _machine(options: argparse.Namespace) -> str:
    times = f"median and best of {options.repeats}" if options.sweep is None else f"median of {options.repeats} or more"
    return f"{machine(options.device)}, torch {torch.__version__}, {options.dtype}; {times}."


def _comparison(options: argparse.Namespace) -> str:
    """The table of all cases at one shape, and a line for each that has no row."""
    shape = Shape(
        options.tokens, options.hidden, options.vocab or 151936, options.tp, options.chunk_tokens,
        options.device, options.dtype,
    )  # fmt: skip
    measured: dict[str, Measured] = {}
    absent: dict[str, list[str]] = {}  # by reason
    named = [case for case in cases(shape.chunk_tokens) if not options.only or matches(case.name, options.only)]
    for name in [FLOOR, *(case.name for case in named), AGAIN]:
        result = _run(name, shape, options.repeats)
        if isinstance(result, str):
            absent.setdefault(result, []).append(name)
        else:
            measured[name] = result
    floor = mean([median(measured[name].seconds) for name in (FLOOR, AGAIN) if name in measured] or [nan])
    whole, weight = 4 * shape.tokens * shape.width / MIB, 4 * shape.width * shape.hidden / MIB
    lines = [
        f"{shape.tokens:,} tokens, hidden {shape.hidden:,}, vocabulary {shape.vocabulary:,}, TP {shape.ranks}. In "
        f"float32 a rank's whole logits are {whole:,.0f} MiB a side, a chunk of them {shape.chunk / MIB:,.0f} MiB, its "
        f"weight {weight:,.0f} MiB.",
        "",
        "| case | median s | best s | of the floor | memory, MiB | in chunks | gradient error | loss error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(name, result, floor, shape) for name, result in measured.items()),
    ]
    reasons = [f"- {', '.join(names)}: {reason}." for reason, names in absent.items()]
    return "\n".join([*lines, "", "Without a row:", "", *reasons] if reasons else lines)


def _row(name: str, result: Measured, floor: float, shape: Shape) -> str:
    middle = median(result.seconds)
    row = f"| {name} | {middle:.3g} | {min(result.seconds):.3g} | {middle / floor:.2f} |"
    if name in (FLOOR, AGAIN):  # whole logits on purpose, and no loss
        return f"{row} | | | |"
    errors = f"{result.gradient_error:.1e} | {result.loss_error:.1e}"
    return f"{row} {result.memory / MIB:,.0f} | {result.memory / shape.chunk:.2f} | {errors} |"


def _sweep(options: argparse.Namespace) -> str:
    """Ours alone: one table for each quantity that grows."""
    hidden, vocabulary, chunk = options.hidden, options.vocab or 16384, options.chunk_tokens
    # The same number of tokens per chunk at the first point as at the last, and enough chunks.
    by_tokens = [(tokens, vocabulary, 1, chunk or SWEPT_TOKENS[0] // 2) for tokens in SWEPT_TOKENS]
    by_vocabulary = [(options.tokens, size, 1, chunk) for size in SWEPT_VOCABULARIES]
    by_ranks = [(options.tokens, 8 * vocabulary, ranks, chunk) for ranks in SWEPT_RANKS]
    tables = dict(zip(SWEEPS, (by_tokens, by_vocabulary, by_ranks), strict=True))
    if options.device == "cuda":
        del tables["ranks"]
    parts = [f"Ours, forward_kl, hidden {hidden:,}."]
    for title, points in tables.items():
        shapes = [Shape(t, hidden, v, p, c, options.device, options.dtype) for t, v, p, c in points]
        if not options.sweep or title in options.sweep:
            parts.append(f"## {title.capitalize()}\n\n{_growth(shapes, options.repeats)}")
    return "\n\n".join(parts)


def _growth(shapes: list[Shape], least: int) -> str:
    """A table of these points, each measured at least `least` times: enough to match the tokens of the largest."""
    most = max(shape.tokens for shape in shapes)
    rows = [
        "| tokens | vocabulary | ranks | median s | µs a token | of the products | of the first | "
        "memory of a rank, MiB | in chunks |",
        "|" + "---:|" * 9,
    ]
    first: float | None = None
    for shape in shapes:
        print(f"{tuple(shape)} ...", file=sys.stderr)
        repeats = max(least, most // shape.tokens)
        ranks = run_ranks(_measure_beside_products, shape.ranks, shape, repeats, timeout=3600)
        ours, products = (
            [max(times) for times in zip(*(getattr(rank, side) for rank in ranks), strict=True)]
            for side in ("seconds", "products")
        )
        ratio = median(mine / floor for mine, floor in zip(ours, products, strict=True))
        first = first or ratio
        memory = max(rank.memory for rank in ranks)
        rows.append(
            f"| {shape.tokens:,} | {shape.vocabulary:,} | {shape.ranks} | {median(ours):.3g} | "
            f"{median(ours) / shape.tokens * 1e6:,.1f} | {ratio:.3f} | {ratio / first:.3f} | {memory / MIB:,.0f} | "
            f"{memory / shape.chunk:.2f} |"
        )
    return "\n".join(rows)


def _run(name: str, shape: Shape, repeats: int) -> Measured | str:
    """Run a case in fresh processes: the measurements of all its ranks, or in one line why there are none."""
    print(f"{name} {tuple(shape)} ...", file=sys.stderr)
    if shape.ranks > 1 and name not in (FLOOR, AGAIN) and not _case(name, None).sharded:
        return "needs the whole vocabulary on a rank"
    if shape.vocabulary % shape.ranks:
        return f"vocabulary {shape.vocabulary} does not divide over {shape.ranks} ranks"
    try:
        ranks = run_ranks(_measure, shape.ranks, name, shape, repeats, timeout=3600)
    except RuntimeError as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            return "needs more memory than is free here"
        return f"fails: {str(error).strip().splitlines()[-1][:160]}"  # the lines before name folders of this machine
    reasons = [result for result in ranks if isinstance(result, str)]
    if reasons:
        return reasons[0]
    slowest = [max(times) for times in zip(*(rank.seconds for rank in ranks), strict=True)]
    return Measured(slowest, *(max(values) for values in list(zip(*ranks, strict=True))[1:]))


def _measure(rank: int, world: int, name: str, shape: Shape, repeats: int) -> Measured | str:
    _settle(world, shape.device)
    group = dist.group.WORLD if world > 1 else None
    if name in (FLOOR, AGAIN):
        return _timed(lambda inputs: _products(*inputs), _inputs(shape, rank), repeats, (0.0, 0.0))
    case = _case(name, shape.chunk_tokens)
    loss, in_small_chunks = loaded(case), loaded(_case(name, 40))
    if isinstance(loss, str) or isinstance(in_small_chunks, str):
        return str(loss)
    # First, so that its imports do not count as its memory.
    errors = _errors(in_small_chunks, case, shape, rank, group)
    inputs = _inputs(shape, rank, main_grad=case.main_grad)
    return _timed(lambda inputs: lambda: _gradients(loss, inputs, group), inputs, repeats, errors)


def _measure_beside_products(rank: int, world: int, shape: Shape, repeats: int) -> Beside:
    """Ours and the four products of the same chunks in turn, so that other load on the machine affects both."""
    _settle(world, shape.device)
    group = dist.group.WORLD if world > 1 else None
    case = _case("ours forward_kl", shape.chunk_tokens)
    loss, inputs = loaded(case), _inputs(shape, rank, main_grad=case.main_grad)
    assert not isinstance(loss, str)
    step = partial(_gradients, loss, inputs, group)
    memory = _timed(lambda _: step, inputs, 1, (0.0, 0.0)).memory
    products = _products(*inputs, tokens=shape.chunk // (4 * shape.width))
    products()
    pairs = [(_seconds(step, shape.device), _seconds(products, shape.device)) for _ in range(repeats)]
    ours, floor = zip(*pairs, strict=True)
    return Beside(list(ours), list(floor), memory)


def _case(name: str, chunk_tokens: int | None) -> Case:
    return next(case for case in cases(chunk_tokens) if case.name == name)


def _settle(world: int, device: str) -> None:
    """Divide the cores among ranks; a rank that requests more memory than is free fails alone, not the machine."""
    torch.set_num_threads(max(1, cores() // world))
    warnings.filterwarnings("ignore")
    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # vLLM's ranks on a CPU compile nothing; a rival does
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if device == "cpu":
        free = int(kernel_bytes("MemAvailable", "/proc/meminfo") * 0.95) // world
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _inputs(shape: Shape, rank: int, *, main_grad: bool = False) -> Inputs:
    """Hidden states that all ranks share, and the rank's own rows of the weights; with `main_grad`, the student's has
    that of a parameter under Megatron's DDP."""
    make = partial(torch.randn, device=shape.device, dtype=DTYPES[shape.dtype])
    torch.manual_seed(0)
    student, teacher = (make(shape.tokens, shape.hidden) for _ in range(2))
    torch.manual_seed(1 + rank)
    student_weight, teacher_weight = (make(shape.width, shape.hidden).div_(shape.hidden**0.5) for _ in range(2))
    if main_grad:
        parameter: Any = student_weight
        # not zeros: the memory must be allocated
        parameter.main_grad = torch.empty_like(student_weight, dtype=torch.float32).zero_()
        parameter.grad_added_to_main_grad = False
    return Inputs(student.requires_grad_(), student_weight.requires_grad_(), teacher, teacher_weight)


def _gradients(loss: Loss, inputs: Inputs, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(*inputs, group)
    hidden_gradient, weight_gradient = torch.autograd.grad(value, inputs[:2])
    return value.detach(), hidden_gradient, getattr(inputs.student_weight, "main_grad", weight_gradient)


def _timed(
    build: Callable[[Inputs], Callable[[], object]], inputs: Inputs, repeats: int, errors: tuple[float, float]
) -> Measured:
    device = inputs.student.device.type
    wanted = [tensor for tensor in inputs[:2] if not hasattr(tensor, "main_grad")]
    gradients = [torch.ones_like(tensor) for tensor in wanted]  # ones: written to, so really allocated
    before = held_bytes(device)
    del gradients
    step = build(inputs)
    seconds = [_seconds(step, device) for _ in range(1 + repeats)]
    return Measured(seconds[1:], max(0, peak_bytes(device) - before), *errors)


def _seconds(step: Callable[[], object], device: str) -> float:
    """Seconds until the last rank has done it."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _products(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, tokens: int | None = None
) -> Callable[[], object]:
    """The four products, of all tokens at once or in chunks."""
    left, right = student.detach(), student_weight.detach()
    rows = tokens or len(left)
    logits = left.new_empty(2, rows, len(right))
    hidden_gradient, weight_gradient = torch.empty_like(left), torch.empty_like(right)

    def step() -> None:
        for here in (slice(first, first + rows) for first in range(0, len(left), rows)):
            x, y = logits[:, : len(left[here])]
            torch.mm(left[here], right.t(), out=x)
            torch.mm(teacher[here], teacher_weight.t(), out=y)
            torch.mm(x, right, out=hidden_gradient[here])
            torch.addmm(weight_gradient, x.t(), left[here], beta=float(here.start > 0), out=weight_gradient)

    return step


def _errors(loss: Loss, case: Case, shape: Shape, rank: int, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Errors of the gradients (the worse) and of the loss, on a small problem that fits in float64 as a whole."""
    small = shape._replace(tokens=96, hidden=64, vocabulary=-(-1003 // shape.ranks) * shape.ranks)
    mine = _inputs(small, rank, main_grad=case.main_grad)
    shards = [_inputs(small, other) for other in range(small.ranks)]
    student, teacher = (mine[place].detach().double().requires_grad_(place == 0) for place in (0, 2))
    weight, teacher_weight = (torch.cat([shard[place].detach().double() for shard in shards]) for place in (1, 3))
    weight.requires_grad_()
    logits = student @ weight.t(), teacher @ teacher_weight.t()
    exact = dense_divergence(*logits, case.divergence, top_k=case.top_k, tail=case.tail).mean()
    hidden_gradient, weight_gradient = torch.autograd.grad(exact, (student, weight))
    value, *gradients = _gradients(loss, mine, group)
    wanted = (hidden_gradient, weight_gradient.chunk(small.ranks)[rank])
    errors = [relative_error(found, exact) for found, exact in zip(gradients, wanted, strict=True)]
    return max(errors), relative_error(value, exact.detach())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
