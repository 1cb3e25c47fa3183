"""Problems from a JSONL or parquet file, a saved `datasets` folder or a hub name."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_trd.config import DataConfig
from megatron_trd.data.programs import NoTests, read_tests
from megatron_trd.errors import UserError, line_of


@dataclass(frozen=True)
class Problem:
    """One problem; `index` is its position in the data set."""

    index: int
    problem: str
    answer: str | None  # for grading: the answer, or a program's tests as JSON; None: this data set cannot be graded
    reference: str | None  # y*, for OPSD; None: this problem has none


def shown_answer(data: DataConfig, problem: Problem) -> str | None:
    """A problem's answer, for people to read; of a program nothing, since its tests may be megabytes."""
    return problem.answer if data.task == "math" else None


def load_problems(config: DataConfig, section: str = "data") -> list[Problem]:
    """All problems of a data set, in order; `section` is the configuration section that names it.

    Raises `UserError` for a file that is missing, empty or broken (with the line), and for a field that is missing.
    """
    if not config.path:
        raise UserError(f"{section}.path is not set: give a JSONL or parquet file, a datasets folder or a hub name")
    rows = _rows(config, section)
    if len(rows) == 0:
        raise UserError(f"data '{config.path}': no problems in it; expected one a row")
    return [_problem(config, index, row) for index, row in enumerate(rows)]


def _rows(config: DataConfig, section: str) -> Sequence[Mapping[str, Any]]:
    path = Path(config.path)
    looks_like_file = path.suffix in (".jsonl", ".json", ".parquet")
    if looks_like_file and not (path.is_file() or (path.suffix == ".parquet" and path.is_dir())):
        raise UserError(f"data '{config.path}': no such file; set {section}.path")
    try:
        if path.suffix in (".jsonl", ".json"):
            return list(_read_jsonl(path))
        # A file, or Spark's folder of parts. `datasets` would copy it to its cache, and does not say that one is empty.
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        if path.is_file():
            raise UserError(f"data '{config.path}': neither .jsonl nor .parquet; convert it to one of these")
        import datasets

        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict) and config.split not in loaded:
                raise UserError(
                    f"data '{path}': no split '{config.split}'; set {section}.split to one of {', '.join(loaded)}"
                )
            return list(loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded)
        return list(datasets.load_dataset(config.path, config.name, split=config.split))
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds of exceptions; the user needs file and reason
        reason = line_of(error) if error.__cause__ is None else f"{line_of(error)} ({line_of(error.__cause__)})"
        here = "" if path.exists() else " is no file or folder here, and as a hub data set"
        what = f"data '{config.path}'{here} (split '{config.split}')"
        key = "split" if " split" in reason else "path"  # "Unknown split", "Bad split"
        raise UserError(f"{what} cannot be read: {reason}; set {section}.{key}") from None


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL file; read here rather than by `datasets` so that a broken line is named."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                raise UserError(
                    f"data '{path}': one JSON array, expected an object a line; jq -c '.[]' FILE > OTHER.jsonl makes it"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"data '{path}' line {number}: not UTF-8 text; convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data '{path}' line {number}: not JSON ({error.msg}); mend or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"data '{path}' line {number}: expected an object with fields, got {type(row).__name__}"
                )
            yield row


def _problem(config: DataConfig, index: int, row: Mapping[str, Any]) -> Problem:
    where = f"data '{config.path}' problem {index + 1}"

    def value_of(name: str | None, key: str, *, may_be_null: bool = False) -> Any:
        if name is None:
            return None
        value = row.get(name)
        nothing = _nothing(value)
        if nothing and name in row and may_be_null:
            return None
        if nothing:
            found = f"field '{name}' is {nothing}" if name in row else f"no field '{name}'"
            none = "" if key == "problem_field" else ", or to null for none"
            raise UserError(f"{where}: {found}; set data.{key} to one of its fields ({', '.join(map(str, row))}){none}")
        return value

    def field(name: str | None, key: str, *, may_be_null: bool = False) -> str | None:
        value = value_of(name, key, may_be_null=may_be_null)
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            raise UserError(
                f"{where}: field '{name}' is a {type(value).__name__}, not text or a number; write the text alone "
                f"(of a chat the user's message, of several answers one) into a field and set data.{key} to it"
            )
        return str(value)

    problem = field(config.problem_field, "problem_field")
    assert problem is not None
    if config.task == "code":
        try:
            tests = value_of(config.answer_field, "answer_field")
            answer = None if tests is None else read_tests(tests, row).to_json()
        except NoTests as error:
            raise UserError(f"{where}: field '{config.answer_field}' holds no tests of a program: {error}") from None
    else:
        answer = field(config.answer_field, "answer_field")
    reference = field(config.reference_field, "reference_field", may_be_null=True)
    return Problem(index, problem, answer, reference)


def _nothing(value: Any) -> str | None:
    """The kind of an empty value as text; None for any other value."""
    if isinstance(value, float) and math.isnan(value):  # how pandas writes a missing value
        return "NaN"
    if isinstance(value, str) and not value.strip():
        return "blank"
    return "null" if value is None else None


def step_indices(count: int, batch_size: int, step: int, *, seed: int, shuffle: bool) -> list[int]:
    """Indices of the problems of a step (from 0): a pure function, so a resumed run continues where it stopped.

    Problems are visited epoch by epoch, each in its own order drawn from (seed, epoch).
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, count)
        indices.append(int(_order(count, seed, epoch)[offset]) if shuffle else offset)
    return indices


@functools.lru_cache(maxsize=2)  # for a large data set it takes a tenth of a second; a step may span two epochs
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
