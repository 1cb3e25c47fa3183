"""Starts a job's ranks on this machine and ends them together.

Uses torchrun's process handling with a different signal policy: a stop request reaches every rank and is given all the
time that a step and a checkpoint take; a failing rank ends the others within seconds, and its reason is printed once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    ProcessFailure,
    Std,
    SubprocessContext,
    start_processes,
)

from megatron_trd.errors import JobFailed, UserError
from megatron_trd.parent import end_with_parent

_GRACE_SECONDS = 5  # between terminating the ranks of a failed job and killing them
_POLL_SECONDS = 0.2
_REASON_BYTES = 2**16  # maximum size of a rank's error record; with less free it may be lost
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
_LAUNCHER = "TRD_LAUNCHER"  # id of the process that started this rank, if it was `launch`
# The prefix that torch adds to an exception; the text after it is sufficient.
_USER_ERROR = re.compile(r"^(UserError|RefusedElsewhere|JobFailed|EngineDied): ")


class RefusedElsewhere(UserError):
    """Bad input that another rank found: this rank ends too, without printing the reason again."""


def run_rank(work: Callable[[], None]) -> NoReturn:
    """Run `work` as one rank; on an error, record the reason for the launcher and exit immediately.

    Exits with code 0, that of a `UserError`, or 1.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    launcher = os.environ.get(_LAUNCHER)
    if not end_with_parent(int(launcher) if launcher else None):
        os._exit(1)  # the launcher was killed while this rank imported torch
    handler = get_error_handler()
    handler.initialize()
    code = 0
    try:
        work()
    except SystemExit:  # bad arguments
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        code = error.exit_code if isinstance(error, UserError) else 1
        with contextlib.suppress(OSError):  # a full disk must not prevent the rank from ending
            handler.record_exception(error)
        with contextlib.suppress(OSError):
            _remove_broken(Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull)))
        with contextlib.suppress(OSError):
            if not isinstance(error, UserError):
                traceback.print_exc()
            elif not isinstance(error, RefusedElsewhere):
                print(error, file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no exit handlers: they would wait for other ranks, and for the threads of vLLM and gloo


def _remove_broken(record: Path) -> None:
    """Remove an error record that was truncated by a full disk: torch raises on one that is not JSON."""
    if record.is_file():
        try:
            json.loads(record.read_text())
        except ValueError:
            record.unlink()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Disable garbage collection, and wandb, while a rank imports modules and builds its objects.

    Collecting over some six thousand modules would take a fifth to a third of the time (measured).
    """
    # vLLM's own setting, but vLLM makes it after megatron-core has had torch read it: 32 processes per rank on a GPU.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    gc.disable()
    # megatron-core imports wandb, if it is there, and does not use it here: half a second, and two folders in /tmp that
    # a rank leaves behind. `reporting.wandb_run` brings it back.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("wandb", None)
    try:
        yield
    finally:
        if modules.get("wandb") is None:
            modules.pop("wandb", None)
        gc.enable()


def launch(arguments: list[str], ranks: int, logs: Path) -> None:
    """Run `python ARGUMENTS` as `ranks` ranks; rank 0 prints to the terminal, all other output goes to `logs`.

    Raises `JobFailed` if a rank died, and the `UserError` that a rank ended with.
    """
    attempt = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    attempt.mkdir(parents=True)
    redirects = {rank: Std.ERR if rank == 0 else Std.ALL for rank in range(ranks)}
    meeting_point = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port of its own
    environment = _environment(ranks, meeting_point.port)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is printed once, here
    signals = _ForwardedSignals()
    context = start_processes(
        name="trd",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(ranks), tuple(arguments)),
        envs={rank: environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)},
        logs_specs=DefaultLogsSpecs(log_dir=str(attempt), redirects=redirects),
    )
    for folder in attempt.iterdir():  # torch's, closed to a group that shares its runs
        folder.chmod(attempt.stat().st_mode)
    failed = _quick_close(context)
    with signals.to(context):
        while (result := context.wait(timeout=_POLL_SECONDS)) is None:
            pass
    if result.is_failed():
        if signals.killed:
            raise JobFailed("stopped at once, as asked: what was not saved is lost")
        if signals.asked and all(failure.exitcode == -signal.SIGTERM for failure in result.failures.values()):
            return  # stopped before the ranks were ready to save
        rank, failure = first_cause({rank: _failure(result.failures[rank]) for rank in failed or result.failures})
        if failure.exit_code == UserError.exit_code and failure.message:  # a full disk may have taken the message
            raise UserError(failure.reason)
        full = ", whose disk is full" if shutil.disk_usage(attempt).free < _REASON_BYTES else ""
        raise JobFailed(f"rank {rank} failed: {failure.reason}; logs in {attempt}{full}")


def _quick_close(context: PContext) -> set[int]:
    """Have torch end the other ranks of a failed job within our grace period, not its 30 seconds.

    Returns a set that will hold the ranks that failed by themselves; torch's result does not distinguish them from
    those that were terminated.
    """
    assert isinstance(context, SubprocessContext)
    failed: set[int] = set()
    close = context.close

    def close_quickly() -> None:
        if not failed:
            codes = {rank: handler.proc.poll() for rank, handler in context.subprocess_handlers.items()}
            failed.update(rank for rank, code in codes.items() if code)
        close(signal.SIGTERM, _GRACE_SECONDS)

    context.close = close_quickly  # type: ignore[method-assign, assignment]  # torch calls it without arguments
    return failed


def _environment(ranks: int, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The launcher owns the store, as torchrun does: no rank has to open one on a port that may be taken by then.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
        _LAUNCHER: str(os.getpid()),
    }


class _ForwardedSignals:
    """While the job runs, a stop signal asks every rank to save and end; a second one kills them.

    Created before the ranks are started: torch then installs its own handlers, which must not be the ones restored.
    """

    def __init__(self) -> None:
        self.asked = self.killed = False
        self._previous = {number: signal.getsignal(number) for number in _STOP_SIGNALS}

    @contextlib.contextmanager
    def to(self, context: PContext) -> Iterator[None]:
        """Forward to the ranks of `context`; whatever happens, none of them outlives the block."""
        for number, handler in self._previous.items():
            ignored = handler is signal.SIG_IGN  # set by nohup: the job must outlive its terminal
            signal.signal(number, signal.SIG_IGN if ignored else functools.partial(self._forward, context))
        try:
            yield
        finally:
            context.close()
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _forward(self, context: PContext, _number: int, _frame: FrameType | None) -> None:
        self.asked, self.killed = True, self.asked
        number = signal.SIGKILL if self.killed else signal.SIGTERM
        if not self.killed:
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        for pid in context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


@dataclass(frozen=True)
class Failure:
    """How a failed rank ended."""

    exit_code: int  # negative: the signal that killed it
    record: Any  # content of its error file, in torch's format; None if it left none
    seconds: float  # since the epoch

    @property
    def reason(self) -> str:
        """The reason in one line."""
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        lines = [line for line in self.message.splitlines() if line.strip()]
        return _USER_ERROR.sub("", lines[0]) if lines else f"exit code {self.exit_code}"

    @property
    def message(self) -> str:
        """Name and text of the exception; empty if unknown."""
        content = self.record.get("message") if isinstance(self.record, dict) else None
        return str(content["message"] if isinstance(content, dict) else content or "")

    def is_lost_neighbour(self) -> bool:
        """Whether the rank may have failed only because another rank ended."""
        text = self.message.lower()
        return self.exit_code == -signal.SIGTERM or "connection" in text or "gloo" in text or "nccl" in text


def first_cause(failures: dict[int, Failure]) -> tuple[int, Failure]:
    """The original failure: a rank killed from outside, else the earliest that is not due to a lost neighbour."""

    def order(item: tuple[int, Failure]) -> tuple[bool, bool, float]:
        failure = item[1]
        killed = failure.exit_code < 0 and failure.exit_code != -signal.SIGTERM
        return not killed, failure.is_lost_neighbour(), failure.seconds

    return min(failures.items(), key=order)


def _failure(found: ProcessFailure) -> Failure:
    try:
        record = json.loads(Path(found.error_file).read_text())
    except (OSError, ValueError):
        record = None
    return Failure(found.exitcode, record, found.timestamp)
