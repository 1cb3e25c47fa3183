"""What a SLURM job asks before its ranks start and once they have ended; `slurm/common.sh` runs both.

    python -m megatron_trd.training.slurm_job begin --ranks N RECIPE [key=value ...]
    python -m megatron_trd.training.slurm_job end --logs DIR --status CODE --restarts N RECIPE [key=value ...]

`begin` checks all that can be known before and prints the folder for the logs of this start. `end` says in one line how
the run stands and why its ranks ended, and prints what becomes of the job: `requeue`, or the exit code it ends with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_trd.config import TrainConfig
from megatron_trd.errors import UserError, in_one_line
from megatron_trd.files import replace_text
from megatron_trd.launch import Failure, first_cause
from megatron_trd.training.checkpoint import steps_saved
from megatron_trd.training.command import check_start, describe
from recipes.common import find_recipe

_STATE = "restarts.json"


def begin(config: TrainConfig, ranks: int) -> Path:
    """The new folder for this start's logs, with one folder per node. Raises `UserError` if the run cannot start."""
    check_start(config, ranks=ranks, resume=True)
    print(describe(config, ranks), file=sys.stderr)
    name = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    logs = Path(config.run_dir).resolve() / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def end(config: TrainConfig, logs: Path, status: int, allowed: int) -> str:
    """Decide, and explain, what becomes of a job whose ranks ended with `status`.

    allowed: how many times in a row a job may restart without progress.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    done = steps_saved(config.run_dir)
    failures = dict(_failures(logs))
    rank, cause = first_cause(failures) if failures else (0, None)
    if cause and cause.exit_code == UserError.exit_code:  # a restart would end the same way
        say(f"megatron-trd: {cause.reason}")
        return str(cause.exit_code)
    if done >= config.steps:
        say(f"{done} steps done, run folder {config.run_dir}")
        return "0"
    why = f"srun ended with exit code {status}" if status else "stopped on request"
    if cause:
        why = f"rank {rank} failed: {cause.reason}"
    why += f"; step {done} of {config.steps} is saved, logs in {logs}"
    try:
        count = _restarts(config, done)
    except OSError as error:  # e.g. a full disk, which may also have ended the ranks
        say(f"{why}; not started again: run folder '{config.run_dir}' cannot be written: {error.strerror}")
        return "1"
    if count > allowed:
        say(f"{why}; not started again: {count - 1} restarts brought no new checkpoint")
        return str(1 if failures else status or 1)  # srun's status is that of the node that reported last
    limit = f", at most {allowed} times in a row without a new checkpoint, now {count}" if failures or status else ""
    say(f"{why}; starting again{limit}")
    return "requeue"


def _failures(logs: Path) -> Iterator[tuple[int, Failure]]:
    """Rank and failure of each failed rank, from the events in each node's torchrun log."""
    for log in logs.glob("*/torchrun.log"):
        for line in log.read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)["metadata"]
                if event["state"] != "FAILED" or event["global_rank"] is None:
                    continue
                [code] = json.loads(event["metadata"])["exit_code"]
                record = json.loads(event["raw_error"])
            except (ValueError, TypeError, KeyError):  # other lines, some of which are JSON too
                continue
            yield event["global_rank"], Failure(code, record, _seconds(record))


def _seconds(record: Any) -> float:
    """When an exception was recorded, in seconds since the epoch."""
    try:
        return float(record["message"]["extraInfo"]["timestamp"])
    except (TypeError, KeyError, ValueError):
        return float("inf")


def _restarts(config: TrainConfig, done: int) -> int:
    """Count, and record, the restarts of this job since it last progressed to step `done`."""
    path = Path(config.run_dir) / _STATE
    job = os.environ["SLURM_JOB_ID"]
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = (before.get("job"), before.get("step")) == (job, done)
    count = before["restarts"] + 1 if same else 1
    replace_text(path, json.dumps({"job": job, "step": done, "restarts": count}) + "\n")
    return int(count)


def main() -> None:
    """Parse, call, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, last = commands.add_parser("begin"), commands.add_parser("end")
    first.add_argument("--ranks", type=int, required=True)
    last.add_argument("--logs", type=Path, required=True)
    last.add_argument("--status", type=int, required=True, help="exit code of srun")
    last.add_argument("--restarts", type=int, required=True, help="allowed in a row without a new checkpoint")
    for command in (first, last):
        command.add_argument("recipe")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    config = find_recipe(given.recipe, given.overrides)
    if given.command == "begin":
        print(begin(config, given.ranks))
    else:
        print(end(config, given.logs, given.status, given.restarts))


if __name__ == "__main__":
    in_one_line(main, "megatron-trd")
