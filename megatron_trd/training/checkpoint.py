"""Checkpoints of a run: Megatron distributed checkpoints that appear whole or not at all.

`<run_dir>/checkpoints/step_N` holds the student (with adapters: its base weights too), its optimizer and schedule
(megatron-core `torch_dist`), the student's configuration and tokenizer, so that `checkpoint_tools.megatron_to_hf` needs
nothing else (`hf/`), an averaged teacher as a Hugging Face folder (`ema/`), and the checksum of every file. All
randomness in a run is a function of (seed, step), so the step number alone gives the position in the data and in
sampling.
"""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.config import CheckpointConfig, LoraConfig
from megatron_trd.engines.student import StudentEngine
from megatron_trd.engines.teacher import TeacherEngine
from megatron_trd.errors import JobFailed, UserError, line_of
from megatron_trd.files import check_sums, digest, files_of, put_in_place, read_sums, write_sums
from megatron_trd.models.dist_checkpoint import CheckpointReader
from megatron_trd.models.export import copy_companions, write_folder
from megatron_trd.models.loading import named_tensors
from megatron_trd.models.megatron_folder import COMPANIONS
from megatron_trd.models.model import open_model
from megatron_trd.models.peft_format import AdapterConfig, read_config
from megatron_trd.parallel.objects import from_all, from_first

_STEP = re.compile(r"step_(\d+)$")
_SAMPLED = "sampled.json"
_FULL = 2**28  # with fewer bytes free, a write error is attributed to a full disk


def checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """Complete checkpoints of a run folder by step, oldest first."""
    found = {}
    for path in Path(run_dir).glob("checkpoints/step_*"):
        match = _STEP.search(path.name)
        if match and (path / "metadata.json").is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def steps_saved(run_dir: str | Path) -> int:
    """Steps in a run's newest checkpoint; 0 if there is none."""
    return max(checkpoints(run_dir), default=0)


def _folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step}"


def _partial(checkpoint: Path) -> Path:
    """Where a checkpoint is kept while it is incomplete."""
    return checkpoint.with_name(f"{checkpoint.name}.partial")


def save(
    run_dir: str | Path,
    step: int,
    student: StudentEngine,
    teacher: TeacherEngine,
    config: CheckpointConfig,
    *,
    sampled_ahead: str | None = None,
) -> Path:
    """Write `step_N` (after `step` steps) and remove the checkpoints that `config` does not keep. Collective.

    sampled_ahead: the next step's samples, if they have been drawn already; stored unchanged.
    """
    target = _folder(run_dir, step)
    partial = _partial(target)
    with _writing(target):
        if dist.get_rank() == 0:
            # Left by saves and removals that failed or were killed.
            for abandoned in (target, *target.parent.glob("step_*.partial")):
                shutil.rmtree(abandoned, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        _write(partial, step, student, teacher, sampled_ahead)
        if dist.get_rank() == 0:
            put_in_place(partial, target)
    if dist.get_rank() == 0:
        for old in _superseded(checkpoints(run_dir), config):
            _remove(old)
    dist.barrier()
    return target


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint if possible. It is renamed first, so that an interrupted removal leaves a `.partial` folder,
    not a damaged checkpoint."""
    partial = _partial(checkpoint)
    with contextlib.suppress(OSError):  # the newest checkpoint exists, which is what matters
        checkpoint.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, step: int, student: StudentEngine, teacher: TeacherEngine, sampled_ahead: str | None) -> None:
    """Write every file of a checkpoint, and their checksums. Collective."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # megatron-core would start a server process for this queue, which outlives a killed trainer and holds its terminal.
    # Saves are synchronous here, and one process needs no server.
    filesystem_async._results_queue = queue.Queue()
    with platform.current().megatron():
        state = _state(student, step, loading=False)
        how = {"sharded_strategy": ("torch_dist", 1), "preprocess_common_before_consistancy_check": _comparable}
        dist_checkpointing.save(state, str(folder), **how)
    if teacher.averaged:
        tensors = named_tensors(teacher.arch, teacher.averages())
        write_folder(folder / "ema", teacher.folder, teacher.arch, tensors, torch.float32)
    if dist.get_rank() == 0:
        (folder / COMPANIONS).mkdir()
        copy_companions(student.folder, folder / COMPANIONS, platform.current().dtype)
        if student.config.lora.rank:
            base = str(Path(student.config.model).resolve())
            AdapterConfig(student.config.lora, base).write(folder / COMPANIONS, student.arch)
        if sampled_ahead is not None:
            (folder / _SAMPLED).write_text(sampled_ahead)
    dist.barrier()
    digests = _shared_digests(folder)
    if dist.get_rank() == 0:
        write_sums(folder, digests)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Report which checkpoint could not be written and how much disk space is free: torch's own error says neither.
    The partial checkpoint is removed, since otherwise a full disk would stay full."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        there = next(folder for folder in target.parents if folder.exists())
        free = shutil.disk_usage(there).free
        shutil.rmtree(_partial(target), ignore_errors=True)
        if not isinstance(error, OSError) and free > _FULL:
            raise
        # megatron-core's report of its writers' errors is long, and irrelevant if the disk is full.
        reason, remedy = ("", "make room") if free < _FULL else (f" ({line_of(error)})", "mend that")
        raise JobFailed(
            f"checkpoint '{target}' could not be written, {free / 2**20:,.0f} MiB are free there{reason}: {remedy}, "
            "and --resume"
        ) from error


def _superseded(saved: dict[int, Path], config: CheckpointConfig) -> list[Path]:
    """Checkpoints that are neither among the newest nor kept permanently; `saved` is ordered by step."""
    older = list(saved.items())[: -config.keep]
    return [path for step, path in older if config.keep_every is None or step % config.keep_every]


def _comparable(state: Any) -> Any:
    """The state that is equal on all ranks: `param_state` is None on ranks that have handed over their part of it."""
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items() if key != "param_state"}
    return [_comparable(value) for value in state] if isinstance(state, list) else state


def _shared_digests(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files, each computed by one rank. Collective."""
    mine = {name: digest(folder / name) for name in _share(files_of(folder))}
    return {name: value for part in from_all(mine) for name, value in part.items()}


def check_files(folder: Path) -> None:
    """Raise `UserError` if a file differs from its recorded checksum; each rank checks some of the files."""
    check_sums(folder, _share(read_sums(folder)))


def _share(names: Iterable[str]) -> list[str]:
    """This rank's share of files, each of which is handled by one rank."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def resume(run_dir: str | Path, student: StudentEngine, teacher: TeacherEngine) -> int:
    """Load the newest checkpoint of a run; returns the number of steps done, 0 if there is none. Collective."""
    found = from_first(checkpoints(run_dir))  # another node may not see the newest checkpoint yet
    if not found:
        return 0
    step, path = list(found.items())[-1]
    try:
        load(path, student)
    except UserError as error:
        older = [earlier.name for earlier in found.values() if earlier != path]
        raise UserError(f"{error}; or remove '{path}', to go on from {older[-1]}" if older else str(error)) from None
    if teacher.averaged:
        if not (path / "ema").is_dir():
            raise UserError(f"checkpoint '{path}' has no averaged teacher; it was written with another teacher.weights")
        teacher.load(open_model(path / "ema").source)
    return step


def sampled_ahead(run_dir: str | Path, step: int) -> str | None:
    """The `sampled_ahead` that was saved with a step's checkpoint."""
    path = _folder(run_dir, step) / _SAMPLED
    return path.read_text() if path.exists() else None


def load(path: Path, student: StudentEngine) -> None:
    """Load a checkpoint into a student of any layout. Collective. Raises `UserError` if one of its files is damaged."""
    from megatron.core import dist_checkpointing

    check_files(path)
    _check_adapters(path, student.config.lora)
    CheckpointReader(path).check_objects()
    with platform.current().megatron():
        state = dist_checkpointing.load(_state(student, 0, loading=True), str(path))
        student.model.module.load_state_dict(state["model"])
        _load_optimizer(student, state["optimizer"])
        student.scheduler.num_steps = 0  # it adds the saved count to its own, which began with the first step's rate
        student.scheduler.load_state_dict(state["scheduler"])


def _check_adapters(path: Path, now: LoraConfig) -> None:
    """Raise `UserError` if a checkpoint's adapters are not such as the run has."""
    saved = read_config(path / COMPANIONS)
    was = saved.lora if saved else LoraConfig()
    if (was.rank, was.numerator) != (now.rank, now.numerator):
        said = f"lora.rank={was.rank}" + (f" lora.alpha={was.numerator:g}" if was.rank else "")
        raise UserError(f"checkpoint '{path}' was saved with {said}: set that, or another run_dir=")


def _load_optimizer(student: StudentEngine, state: Any) -> None:
    """Load moments, master weights and the step count. Learning rates, betas and weight decay come from the
    configuration, where they may have been changed on purpose, and not from the checkpoint."""

    def groups() -> list[dict[str, Any]]:
        return [group for part in platform.optimizer_parts(student.optimizer) for group in part.optimizer.param_groups]

    own = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups()]
    student.optimizer.load_state_dict(state)
    for group, settings in zip(groups(), own, strict=True):
        group.update(settings)


def _state(student: StudentEngine, step: int, *, loading: bool) -> dict[str, Any]:
    student.restore()
    platform.current().complete_optimizer(student.optimizer)  # there may have been no training step yet
    model = student.model.module.sharded_state_dict()
    # canonical parameter-shaped optimizer state: loads at any TP x PP x DP
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathers through host memory to one replica; otherwise each GPU gets all replicas' state in float32.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    return {
        "model": model,
        "optimizer": student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "scheduler": student.scheduler.state_dict(),
        "step": step,
    }
