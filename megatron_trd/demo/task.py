"""The demo's task: short chains of arithmetic on a running value, with solutions in three styles.

A problem starts from a two-digit number and applies four to six operations; every intermediate value has two digits:

    Start with 37. Add 48. Subtract 62. Multiply by 4. Subtract 16. What is the result?

The *reference solution* (y*) is terse, one result per line (`+48=85`). The models write longer lines, in one of two
styles (`37 + 48 = 85` or `37 plus 48 makes 85`), so a refinement is a rewriting, not a copy. `corrupt` imitates a
failed rollout: one slip, after which every line follows from the wrong value.

Everything is a function of a seed. The hash of a problem's text decides whether it belongs to the train or the test
split, so the two never overlap, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["add", "subtract", "multiply"]
Style = Literal["symbols", "words"]
Split = Literal["train", "test"]

STYLES: tuple[Style, ...] = ("symbols", "words")
LOW, HIGH = 10, 99  # range of every value
FEWEST_STEPS, MOST_STEPS = 4, 6
TEST_SHARE = 8  # one problem in this many is a test problem

_PHRASES: dict[Kind, str] = {"add": "Add", "subtract": "Subtract", "multiply": "Multiply by"}
_TERSE: dict[Kind, str] = {"add": "+", "subtract": "-", "multiply": "*"}
_SIGNS: dict[Style, dict[Kind, str]] = {
    "symbols": {"add": "+", "subtract": "-", "multiply": "*"},
    "words": {"add": "plus", "subtract": "minus", "multiply": "times"},
}
_EQUALS: dict[Style, str] = {"symbols": "=", "words": "makes"}
# A slip is a forgotten carry or a miscount: the result is off by ten or by one.
_SLIPS = (-10, -1, 1, 10)
_MISREAD_SHARE = 0.2  # of the lines of a mangled solution


@dataclass(frozen=True)
class DemoProblem:
    """One problem in the form of the data sets; `solution` is the reference solution y*."""

    problem: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Step:
    """One operation of a chain."""

    kind: Kind
    operand: int

    def apply(self, value: int) -> int:
        """The right result of this operation on `value`."""
        if self.kind == "add":
            return value + self.operand
        return value - self.operand if self.kind == "subtract" else value * self.operand


def generate(count: int, seed: int, split: Split = "train") -> list[DemoProblem]:
    """`count` different problems of a split; the same ones for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, DemoProblem] = {}
    while len(found) < count:
        problem = _draw(rng)
        if split_of(problem.problem) == split:
            found[problem.problem] = problem
    return list(found.values())


def split_of(problem: str) -> Split:
    """The split a problem's text belongs to."""
    return "test" if hashlib.sha256(problem.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def write_jsonl(path: Path, problems: Iterable[DemoProblem]) -> None:
    """Write problems as one JSON object per line, with the fields problem, answer and solution."""
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def parse(problem: str) -> tuple[int, list[Step]]:
    """The start value and the operations stated in a problem's text."""
    start = re.match(r"Start with (\d+)\.", problem)
    if start is None:
        raise ValueError(f"not a demo problem: {problem!r}")
    kinds = {phrase: kind for kind, phrase in _PHRASES.items()}
    found = re.findall(r"(Add|Subtract|Multiply by) (\d+)\.", problem)
    return int(start[1]), [Step(kinds[phrase], int(operand)) for phrase, operand in found]


def own_solution(problem: DemoProblem, style: Style) -> str:
    """The right solution, in the style of the demo's models."""
    start, steps = parse(problem.problem)
    return _write(start, steps, _chain(start, steps), style)


def corrupt(problem: DemoProblem, style: Style, rng: random.Random) -> tuple[str, int]:
    """A solution with one slip, consistently continued, and the index of its first wrong line.

    The step of the slip is uniform among those after which all later values keep two digits.
    """
    start, steps = parse(problem.problem)
    candidates = [
        [values for slip in _SLIPS if (values := _chain(start, steps, at, slip)) and _in_range(values)]
        for at in range(len(steps))
    ]
    at = rng.choice([at for at, chains in enumerate(candidates) if chains])
    return _write(start, steps, rng.choice(candidates[at]), style), at


def mangle(problem: DemoProblem, style: Style, rng: random.Random) -> str:
    """A solution with some lines wrong in any way: another operation, another number, another result.

    Responses of a model in training go wrong in more ways than `corrupt` covers.
    """
    start, steps = parse(problem.problem)
    misread = [_misread(step, rng) if rng.random() < _MISREAD_SHARE else step for step in steps]
    values: list[int] = []
    value = start
    for step in misread:
        value = step.apply(value) if rng.random() > _MISREAD_SHARE else rng.randint(LOW, HIGH)
        values.append(value)
    return _write(start, misread, values, style)


def _misread(step: Step, rng: random.Random) -> Step:
    if rng.random() < 0.5:
        return Step(step.kind, rng.randint(2, HIGH))
    return Step(rng.choice([kind for kind in _PHRASES if kind != step.kind]), step.operand)


def first_wrong_step(problem: DemoProblem, response: str) -> int | None:
    """Index of a response's first wrong line; None if every line is right.

    A line is right if it states the equation that the problem requires at that place, in either style; the line after
    the last equation states the answer. A missing line is wrong, and so is an extra one.
    """
    start, steps = parse(problem.problem)
    values = _chain(start, steps)
    written = [_write(start, steps, values, style).split("\n") for style in STYLES]
    rights = [set(lines) for lines in zip(*written, strict=True)]
    lines = response.rstrip("\n").split("\n")
    for index, right in enumerate(rights):
        if index >= len(lines) or lines[index].strip() not in right:
            return index
    return len(rights) if len(lines) > len(rights) else None


def _draw(rng: random.Random) -> DemoProblem:
    start = value = rng.randint(LOW, HIGH)
    steps: list[Step] = []
    for _ in range(rng.randint(FEWEST_STEPS, MOST_STEPS)):
        step = _draw_step(rng, value)
        steps.append(step)
        value = step.apply(value)
    text = (
        f"Start with {start}. " + " ".join(f"{_PHRASES[s.kind]} {s.operand}." for s in steps) + " What is the result?"
    )
    values = _chain(start, steps)
    lines = [f"{_TERSE[step.kind]}{step.operand}={result}" for step, result in zip(steps, values, strict=False)]
    return DemoProblem(text, str(value), "\n".join([*lines, f"\\boxed{{{value}}}"]))


def _draw_step(rng: random.Random, value: int) -> Step:
    kinds: list[Kind] = []
    if value + LOW <= HIGH:
        kinds += ["add"] * 2
    if value - LOW >= LOW:
        kinds += ["subtract"] * 2
    if value * 2 <= HIGH:
        kinds += ["multiply"]
    kind = rng.choice(kinds)
    if kind == "add":
        return Step(kind, rng.randint(LOW, HIGH - value))
    if kind == "subtract":
        return Step(kind, rng.randint(LOW, value - LOW))
    return Step(kind, rng.randint(2, min(9, HIGH // value)))


def _chain(start: int, steps: list[Step], slip_at: int | None = None, slip: int = 0) -> list[int]:
    values: list[int] = []
    value = start
    for index, step in enumerate(steps):
        value = step.apply(value) + (slip if index == slip_at else 0)
        values.append(value)
    return values


def _in_range(values: list[int]) -> bool:
    return all(LOW <= value <= HIGH for value in values)


def _write(start: int, steps: list[Step], values: list[int], style: Style) -> str:
    signs, equals = _SIGNS[style], _EQUALS[style]
    before = [start, *values[:-1]]
    lines = [f"{a} {signs[s.kind]} {s.operand} {equals} {b}" for a, s, b in zip(before, steps, values, strict=False)]
    return "\n".join([*lines, f"The answer is \\boxed{{{values[-1]}}}."])
