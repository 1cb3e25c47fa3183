"""Requirements of a job on one node: processes, memory, disks, and the recipe's model and data."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.doctor import cgroups
from megatron_trd.doctor.rows import Row
from megatron_trd.doctor.versions import version_rows
from megatron_trd.doctor.waiting import first_line, within
from megatron_trd.errors import UserError

if TYPE_CHECKING:
    from megatron_trd.training.checks import Inputs

# Twice what was measured on jobs of the embedded model on a CPU, where a rank has 200 files open and 15 more for each
# rank of the job: NCCL and larger models have more.
_FILES, _FILES_A_RANK = 400, 30
# A rank has 152 threads on 2 cores; libraries with a thread pool have one thread per core in it.
_THREADS, _THREADS_A_CORE = 256, 4
# A rank of torch, megatron-core and vLLM with the embedded model takes 2.9 GiB. A larger model's own share is what
# `megatron-trd plan` forecasts.
_HOST_GIB_A_RANK = 3.0
# NCCL's manual recommends --shm-size=1g in a container, whose default of 64 MiB leads to a bus error. vLLM takes 8.5
# MiB for two tensor-parallel ranks on a CPU.
_SHARED_MEMORY_GIB = 1.0
# For a run's metrics, samples and logs, and compiler caches in TMPDIR; checkpoints come on top.
_DISK_GIB = 1.0
# Weights, main weights and Adam's two moments in 4 bytes each; 16.9 measured with the embedded model.
_CHECKPOINT_BYTES_A_PARAMETER = 16
# A checkpoint of 8 billion parameters takes 22 minutes at this rate, and every rank waits for it.
_WRITE_MB_S = 100.0
_WRITE_SECONDS = 2.0  # time limit of its measurement
_WRITE_BLOCK, _WRITE_BLOCKS = 16 * 2**20, 16
# This process's own context on a GPU takes about half a GiB; the rest is used by others, and a job would lack it.
_GPU_USED_GIB = 2.0

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Task:
    """The job that the node is checked for."""

    config: TrainConfig | None  # of a recipe, if one is given
    nodes: int
    ranks: int  # of the job
    quick: bool
    seconds: float  # how long a folder or a data set may take to answer


def node_rows(task: Task) -> list[Row]:
    """All checks of this node except those of GPU memory and of the network, which its ranks make."""
    current = platform.current()
    recipe, inputs = _recipe(task)
    gpus = current.gpu_count()
    local = math.ceil(max(task.ranks, inputs.world_size if inputs else 1) / task.nodes)
    rows = [*version_rows(current.extra), *_libraries(), _gpus(gpus, local)]
    local = max(local, gpus)  # a job has a rank for every GPU
    rows += [_open_files(local * task.nodes), _processes(local), _host_memory(local), _shared_memory()]
    rows += [_patient(task.seconds, "run folder", lambda: _run_folder(task, inputs))]
    rows += [_patient(task.seconds, "temporary folder", lambda: _temporary_folder(task))]
    return [*rows, *recipe]


def gpu_rows(first: int, every: int) -> list[Row]:
    """Memory of the node's GPUs `first`, `first + every`, …: each rank checks its share."""
    return [_gpu_memory(index) for index in range(first, platform.current().gpu_count(), every)]


def _gpu_memory(index: int) -> Row:
    check, needed = "GPU memory", f"at most {_GPU_USED_GIB:g} GiB in use"
    try:
        name, used, total = platform.current().gpu(index)
    except RuntimeError as error:
        return Row(check, "not usable", needed, "fails", f"GPU {index}: {first_line(error)}")
    found = f"{name}: {used:.1f} of {_gib(total)} in use"
    if used > _GPU_USED_GIB:
        says = f"GPU {index} ({name}) has {_gib(used)} in use by other processes: end them (nvidia-smi lists them)"
        return Row(check, found, needed, "fails", says, -used)
    return Row(check, found, needed, value=-used)


def _libraries() -> list[Row]:
    found = platform.current().libraries()
    return [Row(name, text, "", alike=name != "driver") for name, text in found.items()]  # drivers may differ


def _gpus(count: int, local: int) -> Row:
    complaint = platform.current().unused_gpu()
    if complaint:
        says = f"{complaint}: mend it, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        return Row("GPUs", "not usable", "usable", "fails", says)
    if not count:
        return Row("GPUs", "none", "not needed on a CPU")
    needed = f"{local}, one a rank"
    if count < local:
        says = f"{local} ranks on a node of {count} GPUs: take more nodes or fewer ranks (world_size=…)"
        return Row("GPUs", str(count), needed, "fails", says, count)
    return Row("GPUs", str(count), needed, value=count)


def _open_files(ranks: int) -> Row:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = math.inf if limit == resource.RLIM_INFINITY else limit
    needed = _FILES + _FILES_A_RANK * ranks
    says = f"a process may open {limit} files, a job of {ranks} ranks needs {needed}: ulimit -n {max(needed, 65536)}"
    return _at_least("open files", allowed, needed, _count, says)


def _processes(local: int) -> Row:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    allowed = min(math.inf if limit == resource.RLIM_INFINITY else limit, cgroups.tasks_left())
    needed = local * (_THREADS + _THREADS_A_CORE * (os.cpu_count() or 1))
    says = (
        f"{_count(allowed)} processes and threads may be started, {local} ranks need {needed}: raise ulimit -u, "
        "or the container's limit (--pids-limit)"
    )
    return _at_least("processes", allowed, needed, _count, says)


def _host_memory(local: int) -> Row:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine, allowed = int(lines["MemAvailable"].split()[0]) * 1024, cgroups.memory_left()
    left, whose = (allowed, "the job's control group") if allowed < machine else (machine, "this machine")
    left /= _GIB
    needed = local * _HOST_GIB_A_RANK
    says = f"{whose} has {_gib(left)} of memory left, {local} ranks need {_gib(needed)}: ask for more (sbatch --mem)"
    return _at_least("host memory", left, needed, _gib, says)


def _shared_memory() -> Row:
    try:
        free = shutil.disk_usage("/dev/shm").free / _GIB
    except OSError:
        free = 0.0
    says = f"/dev/shm has {_gib(free)} free, NCCL and vLLM need {_gib(_SHARED_MEMORY_GIB)}: start the container with "
    return _at_least("shared memory", free, _SHARED_MEMORY_GIB, _gib, f"{says}--shm-size=1g or more, or empty /dev/shm")


def _run_folder(task: Task, inputs: Inputs | None) -> Row:
    config = task.config or TrainConfig()
    checkpoints = _checkpoint_gib(config, inputs) if inputs else 0.0
    return _disk("run folder", Path(config.run_dir), _DISK_GIB + checkpoints, "set another run_dir=", task.quick)


def _checkpoint_gib(config: TrainConfig, inputs: Inputs) -> float:
    """Size of checkpoints that still need room: those kept and the one being written."""
    from megatron_trd.models.weights import exported_slots
    from megatron_trd.training.checkpoint import checkpoints

    parameters = sum(slot.size for slot in exported_slots(inputs.student.arch))
    count = max(1, config.checkpoint.keep + 1 - len(checkpoints(config.run_dir)))
    return parameters * _CHECKPOINT_BYTES_A_PARAMETER * count / _GIB


def _temporary_folder(task: Task) -> Row:
    check, used, wanted = "temporary folder", tempfile.gettempdir(), os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != used:  # Python silently uses another one; compilers do not
        says = f"{check} '{wanted}' (TMPDIR) cannot be written: make it, free some of it, or set another TMPDIR"
        return Row(check, "not writable", "writable", "fails", says)
    return _disk(check, Path(used), _DISK_GIB, "set another TMPDIR", task.quick)


def _disk(check: str, folder: Path, needed: float, cure: str, quick: bool) -> Row:
    """Free space and, unless `quick`, write speed where `folder` is or would be created. Leaves nothing there."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        free = shutil.disk_usage(place).free / _GIB
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
            file.flush()
            speed = None if quick or free * _GIB < 2 * _WRITE_BLOCK else _write_speed(file.fileno())
    except OSError as error:
        says = f"{check} '{folder}' cannot be written: {error.strerror}; {cure}"
        return Row(check, "not writable", "writable", "fails", says)
    found, wish = f"{_gib(free)} free", _gib(needed)
    if speed is not None:
        found, wish = f"{found}, {speed:.0f} MB/s", f"{wish}, {_WRITE_MB_S:.0f} MB/s"
    if free < needed:
        says = f"{check} '{folder}' has {_gib(free)} free, {_gib(needed)} are needed: free some or {cure}"
        return Row(check, found, wish, "fails", says, free)
    if speed is not None and speed < _WRITE_MB_S:
        says = f"{check} '{folder}' is written at {speed:.0f} MB/s: checkpoints will take long; {cure}"
        return Row(check, found, wish, "warning", says, free)
    return Row(check, found, wish, value=free)


def _write_speed(file: int) -> float:
    """MB/s at which blocks are written to the disk."""
    block = os.urandom(_WRITE_BLOCK)  # some file systems compress
    written, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _WRITE_SECONDS and written < _WRITE_BLOCKS * _WRITE_BLOCK:
        written += os.pwrite(file, block, 0)  # at the same offset: never takes more than a block of disk space
        os.fsync(file)
    return written / (time.perf_counter() - begin) / 1e6


def _recipe(task: Task) -> tuple[list[Row], Inputs | None]:
    """The checks that `train` makes of the models and the data, as a row."""
    if task.config is None:
        return [], None
    config = task.config
    needed = "what train checks"

    def check() -> Inputs:
        from megatron_trd.training import checks

        return checks.check(config)

    try:
        inputs = within(task.seconds, check)
    except UserError as error:
        return [Row("recipe", "not usable", needed, "fails", str(error))], None
    except Exception as error:
        says = f"the model or the data of the recipe cannot be read: {first_line(error)}"
        return [Row("recipe", "not usable", needed, "fails", says)], None
    found = f"{inputs.student.arch.family}, {len(inputs.problems)} problems, {inputs.world_size} ranks"
    return [Row("recipe", found, needed)], inputs


def _patient(seconds: float, check: str, work: Callable[[], Row]) -> Row:
    try:
        return within(seconds, work)
    except TimeoutError:
        says = f"{check}: its file system did not answer within {seconds:g} s; is it mounted?"
        return Row(check, "no answer", f"in {seconds:g} s", "fails", says)


def _at_least(check: str, found: float, needed: float, text: Callable[[float], str], says: str) -> Row:
    if found < needed:
        return Row(check, text(found), text(needed), "fails", says, found)
    return Row(check, text(found), text(needed), value=found)


def _count(number: float) -> str:
    return "no limit" if math.isinf(number) else f"{number:.0f}"


def _gib(size: float) -> str:
    return f"{size:.1f} GiB"
