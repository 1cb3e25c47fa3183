"""Metrics and sample pairs of a run folder: `metrics.jsonl`, `tensorboard/` and `samples/`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_trd.errors import UserError
from megatron_trd.files import replace_text

METRICS_FILE = "metrics.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLES_FOLDER = "samples"

# JSON has no literal for these; the names are those of protobuf's JSON mapping, and `float` reads each of them.
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


class MetricsWriter:
    """Appends one line per step to `metrics.jsonl`, and the step's numbers to `tensorboard/`.

    With `wandb`, a `wandb.Run`, the numbers go there too; the caller closes it.

    For another `file`, the numbers go to a subfolder of its name: TensorBoard reads one file per folder at a time.

    `resume_from` is the first step (from 0) this process will write. Lines of that step and later ones are removed: a
    run that was killed after its last checkpoint repeats those steps.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool, resume_from: int, file: str = METRICS_FILE, wandb: Any = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file
        kept = [row for row in _read_rows(path) if row["step"] < resume_from] if path.exists() else []
        replace_text(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        events = folder / TENSORBOARD_FOLDER / ("" if file == METRICS_FILE else path.stem)
        self._tensorboard = _tensorboard_writer(events, resume_from) if tensorboard else None
        self._wandb = wandb

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step (from 0). Values are JSON scalars; NaN and infinities are kept as strings."""
        self._file.write(_line({"step": step, **metrics}))
        self._file.flush()
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if self._wandb is not None:
            self._wandb.log({"step": step} | numbers)
        if self._tensorboard is None:
            return
        for key, value in numbers.items():
            self._tensorboard.add_scalar(key, value, step)
        self._tensorboard.flush()  # a step takes seconds; a killed run keeps all its numbers

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class SampleWriter:
    """Writes the y_o / y_r pairs of a step to `samples/step_<step>.jsonl`.

    `resume_from` as for `MetricsWriter`: the files of that step and later ones are removed.
    """

    def __init__(self, folder: Path, *, resume_from: int) -> None:
        self._folder = folder / SAMPLES_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        for step, path in sample_files(folder):
            if step >= resume_from:
                path.unlink()

    def write(self, step: int, pairs: list[dict[str, Any]]) -> None:
        """Write the pairs of a step (from 0), one JSON object per line, replacing an earlier file of that step."""
        replace_text(self._folder / f"step_{step:05d}.jsonl", "".join(map(_line, pairs)))


def sample_files(folder: Path) -> list[tuple[int, Path]]:
    """Steps whose pairs a run kept, and their files, in the order of the steps."""
    return sorted((int(path.stem.split("_")[1]), path) for path in (folder / SAMPLES_FOLDER).glob("step_*.jsonl"))


def read_metrics(folder: Path, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    """One dictionary per step, in the order written. An incomplete last line is omitted.

    Raises `UserError` if the folder has no such file, or if a line before the last is not a metrics line.
    """
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder}: no {file}; expected the folder of a training run")
    return [{key: _number(value) for key, value in row.items()} for row in _read_rows(path)]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file as written, without an incomplete last one."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0  # a metrics line is an object with a numeric step
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a metrics line; remove it") from None
        rows.append(row)
    return rows


def _line(values: dict[str, Any]) -> str:
    return json.dumps({key: _json_value(value) for key, value in values.items()}, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _tensorboard_writer(folder: Path, resume_from: int) -> Any:
    # Imported here: it takes a second, and is not needed for reading metrics.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_from)
