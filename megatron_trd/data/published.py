"""Implementation of `megatron-trd fetch`: published problems, in the form that runs and evaluations read.

Names, splits and fields are those of the hub, as programs use them that were published with it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_trd.data.programs import NoTests, read_tests
from megatron_trd.errors import UserError, line_of
from megatron_trd.files import replace_lines

Row = Mapping[str, Any]

_READS_INPUT = "The program reads standard input and writes standard output."


class _LeftOut(Exception):
    """A row that cannot be graded, with the reason."""


@dataclass(frozen=True)
class Published:
    """A set of problems on the hub."""

    path: str  # of the data set, or a format of `files`
    split: str
    convert: Callable[[Row], dict[str, str | None]]
    files: list[str] = field(default_factory=list)  # where a data set is loaded file by file

    @property
    def where(self) -> str:
        """Its place on the hub."""
        return self.files[0] if self.files else self.path

    def rows(self) -> Iterable[Row]:
        """All rows. Raises whatever `datasets` does."""
        import datasets

        found: Iterable[Row] = datasets.load_dataset(self.path, split=self.split, data_files=self.files or None)
        return found


def fetch(name: str, out: Path) -> str:
    """Write a published set of problems as JSON lines; returns what was written, in a line.

    Raises `UserError` for a name that is not known, where the hub cannot be reached, and for rows of another form.
    """
    if name not in PUBLISHED:
        raise UserError(f"'{name}' is not known; known are {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    try:
        rows = published.rows()
    except Exception as error:  # datasets raises many kinds of exceptions
        raise UserError(
            f"'{published.where}' cannot be fetched: {line_of(error)}; run this where the hub can be reached "
            f"and copy {out}"
        ) from None
    left_out: Counter[str] = Counter()
    written = 0

    def lines() -> Iterator[str]:
        nonlocal written
        for number, row in enumerate(rows, 1):
            try:
                line = json.dumps(published.convert(row)) + "\n"
            except _LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            except Exception as error:
                raise UserError(
                    f"'{published.where}' problem {number} is not in the form that it was published in: "
                    f"{type(error).__name__}: {line_of(error)}; convert it yourself, as docs/data.md says"
                ) from None
            written += 1
            yield line

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_lines(out, lines())
    without = "".join(f", without {count} {reason}" for reason, count in left_out.items())
    return f"{out}: {written:,} problems{without}"


def _math(row: Row, problem: str = "problem") -> dict[str, str | None]:
    return {"problem": row[problem], "answer": str(row["answer"])}


def _amo_bench(row: Row) -> dict[str, str | None]:
    if row["answer_type"] == "description":
        raise _LeftOut("whose answers are descriptions, which only a model can grade")
    return _math(row, "prompt")


def _human_eval(row: Row) -> dict[str, str | None]:
    problem = f"Write a program in which this function is complete:\n\n```python\n{row['prompt'].rstrip()}\n```"
    return _program(problem, row["test"], row)


def _mbpp(row: Row) -> dict[str, str | None]:
    shown = row["test_list"][0]  # the name of the function is in the tests alone
    return _program(f"{row['prompt'].strip()}\n\nThis must pass:\n\n```python\n{shown}\n```", row["test"])


def _live_code_bench(row: Row) -> dict[str, str | None]:
    cases = json.loads(row["public_test_cases"]) + _unpacked(row["private_test_cases"])
    tests: dict[str, Any] = {key: [case[key.removesuffix("s")] for case in cases] for key in ("inputs", "outputs")}
    if cases and cases[0]["testtype"] == "functional":  # each line is an argument, in JSON
        tests["inputs"] = [[json.loads(line) for line in given.split("\n") if line] for given in tests["inputs"]]
        tests["outputs"] = [json.loads(result) for result in tests["outputs"]]
        tests["fn_name"] = json.loads(row["metadata"])["func_name"]
    return _program(_with_starter(row["question_content"], row["starter_code"]), tests)


def _taco(row: Row) -> dict[str, str | None]:
    solutions = json.loads(row["solutions"] or "[]")
    made = _program(_with_starter(row["question"], row["starter_code"]), row["input_output"] or "")
    return made | {"solution": solutions[0] if solutions else None}


def _program(problem: str, tests: Any, row: Row | None = None) -> dict[str, str | None]:
    try:
        read = read_tests(tests, row or {})
    except NoTests:
        raise _LeftOut("without tests that can be read") from None
    return {"problem": problem, "answer": read.code or (tests if isinstance(tests, str) else json.dumps(tests))}


def _with_starter(problem: str, starter: str | None) -> str:
    if not starter:
        return f"{problem.strip()}\n\n{_READS_INPUT}"
    return f"{problem.strip()}\n\nBegin the program with:\n\n```python\n{starter.rstrip()}\n```"


def _unpacked(text: str) -> list[Any]:
    """LiveCodeBench's hidden tests: JSON, or the JSON in a pickled text that is compressed."""
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    pickled = zlib.decompress(base64.b64decode(text))
    found = json.loads(_PlainUnpickler(io.BytesIO(pickled)).load())
    assert isinstance(found, list)
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles text and numbers, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is in it")


PUBLISHED = {
    "aime_2024": Published("HuggingFaceH4/aime_2024", "train", _math),
    "aime_2025": Published("MathArena/aime_2025", "train", _math),
    "hmmt_2025": Published("MathArena/hmmt_feb_2025", "train", _math),
    "beyond_aime": Published("ByteDance-Seed/BeyondAIME", "test", _math),
    "amo_bench": Published("meituan-longcat/AMO-Bench", "test", _amo_bench),
    "human_eval_plus": Published("evalplus/humanevalplus", "test", _human_eval),
    "mbpp_plus": Published("evalplus/mbppplus", "test", _mbpp),
    "live_code_bench_v6": Published(
        "json", "train", _live_code_bench, ["hf://datasets/livecodebench/code_generation_lite/test6.jsonl"]
    ),
    "taco": Published("parquet", "train", _taco, ["hf://datasets/BAAI/TACO/ALL/train-*.parquet"]),
}
