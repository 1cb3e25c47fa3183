"""Run a function on several real processes: the one multi-process helper of the tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_trd import platform

# A process forked from one that has imported these starts in milliseconds; importing them takes each rank ten seconds
# or more, which would be most of what the tests take.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA itself cannot be forked
os.environ.update(platform.current().sampler_environment())  # which vLLM reads when it is imported
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "transformers", "megatron_trd.training.run", "vllm.v1.engine.core_client"]
)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900, backend: str = "gloo"
) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` processes; what each returned, by rank.

    `fn` is a module's top-level function, and it and its arguments are picklable. Each process has one torch thread,
    this process's environment, and the default process group, of `backend`, ready. A process that fails, dies, or is
    still running after `timeout` seconds ends them all, and RuntimeError carries the first failure's traceback.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            # Not daemons: those may have no children, and saving a checkpoint starts some.
            _CONTEXT.Process(target=_rank, args=(fn, rank, world_size, args, folder, dict(os.environ), backend))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, timeout, Path(folder))
        except BaseException:
            for process in processes:
                _kill(process)
            raise
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    environment: dict[str, str],
    backend: str,
) -> None:
    """The life of one process: leaves `RANK.result`, or `RANK.error` and exit code 1."""
    os.setsid()  # so that the children it may have end with it
    os.environ.clear()  # the fork server's is that of its own start
    os.environ.update(environment)
    world = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        torch.save(result, Path(folder, f"{rank}.result"))
        dist.barrier()  # nobody leaves while another may still talk to it
        dist.destroy_process_group()
    except BaseException:
        # Written whole under another name first: the parent may look while this is being written.
        Path(folder, f"{rank}.partial").write_text(traceback.format_exc())
        Path(folder, f"{rank}.partial").rename(Path(folder, f"{rank}.error"))
        os._exit(1)  # no farewell collectives, which could wait for ranks that wait for this one


def _wait(processes: list[Any], timeout: float, folder: Path) -> None:
    """Return when every process has ended well; raise on the first that has not, or when time is up."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RuntimeError(f"ranks {waiting} of {len(processes)} still running after {timeout} s")
        for sentinel in ended:
            running.pop(sentinel)
        if any(process.exitcode for process in processes if process.sentinel in ended):
            raise RuntimeError(_first_failure(processes, folder))


def _kill(process: Any) -> None:
    """End a process and its children, wherever it is in its life."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made its group yet
    process.join()


def _first_failure(processes: list[Any], folder: Path) -> str:
    """Why the first process to fail did; the others may have failed for losing it."""
    # A process that was killed wrote nothing, and whatever the others wrote came of it.
    for rank, process in enumerate(processes):
        if process.exitcode not in (None, 0, 1):
            return f"rank {rank} of {len(processes)} died with exit code {process.exitcode}"
    first = min(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {first.stem} of {len(processes)} failed:\n{first.read_text()}"
