"""The folder of a run: checks that it is writable, that no other run uses it, and which settings it was begun with."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.errors import UserError
from megatron_trd.training.run_lock import check_lock, release_lock, take_lock

_MAY_CHANGE = ("log.", "checkpoint.", "held_out.every", "run_dir")  # settings that a resumed run may change
_LAYOUT = {  # these too: they decide where and in which parts the same is computed, and so affect only rounding
    *("world_size", "overlap", "loss.chunk_tokens"),
    *(f"student.{key}" for key in ("tp", "pp", "ep", "sequence_parallel", "micro_batch_size", "recompute", "offload")),
    *(f"teacher.{key}" for key in ("tp", "pp", "ep", "micro_batch_size", "hidden_in", "offload")),
    *(
        f"sampler.{key}"
        for key in ("tp", "stream", "one_engine", "max_sequences", "max_running_tokens", "request_timeout")
    ),
    *(
        f"sampler.{key}"
        for key in ("memory_fraction", "host_kv_cache_gib", "sleep", "refit_bucket_mib", "enforce_eager")
    ),
}
_PROBE_BYTES = 1 << 20


def claim(config: TrainConfig, *, resume: bool, same: Collection[str] = ()) -> None:
    """Make this process the owner of the run folder and write the run's configuration into it.

    `same`: keys that name what the run was begun with, wherever that is now (`provenance.same_inputs`).

    Raises `UserError` as `check_run_folder` does; an existing run is then left unchanged.
    """
    folder = Path(config.run_dir)
    make_folder(folder)
    take_lock(folder)
    try:
        changes = _check_begun(config, folder, resume, same)
        if changes:
            print(f"going on with {', '.join(changes)}: the same training, no longer to the same bits", flush=True)
        configuration.save(config, folder / "config.yaml")
        # Left by a killed run under teacher.hidden_in=disk: this one may have fewer ranks, or keep nothing on disk.
        shutil.rmtree(folder / "hidden", ignore_errors=True)
    except BaseException:
        release_lock(folder)
        raise


def check_run_folder(config: TrainConfig, resume: bool, same: Collection[str] = ()) -> None:
    """Raise `UserError` if the run folder cannot be written, is in use, or holds a run that would be overwritten.

    `same`: as for `claim`.
    """
    folder = Path(config.run_dir)
    # first: a folder that is not readable, or whose name is too long, cannot even be inspected
    made = make_folder(folder)
    check_lock(folder)
    _check_begun(config, folder, resume, same)
    with contextlib.suppress(OSError):  # another run may use it by now
        for empty in made:
            empty.rmdir()


def _check_begun(config: TrainConfig, folder: Path, resume: bool, same: Collection[str]) -> list[str]:
    """Settings that differ from those the run was begun with, as text."""
    begun = folder / "config.yaml"
    if not begun.exists():
        return []
    if not resume:
        raise UserError(f"run folder '{folder}' holds a run already: add --resume to go on, or set another run_dir=")
    return _changes(configuration.load(begun), config, folder, same)


def _changes(begun: TrainConfig, config: TrainConfig, folder: Path, same: Collection[str]) -> list[str]:
    """A run must continue as it began, or its checkpoints, data order and learning rates would not match."""
    before, now = configuration.flatten(begun), configuration.flatten(config)
    if config.world_size is None:  # decided when the ranks start
        now["world_size"] = before["world_size"]
    different = [key for key, value in now.items() if value != before[key] and key not in same]
    changed = [key for key in different if not key.startswith(_MAY_CHANGE)]
    for key in changed:
        if key not in _LAYOUT:
            raise UserError(
                f"run folder '{folder}' was begun with {key}={before[key]}, not {now[key]}: resume with the same "
                f"settings, set another run_dir=, or change it on purpose: in '{folder}/config.yaml' too"
            )
    return [f"{key}={now[key]} instead of {before[key]}" for key in changed]


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and check that it can be written and is not full; returns the folders created, innermost first.

    Raises `UserError`.
    """
    if folder.resolve() in (Path.cwd(), Path(folder.anchor)):
        raise UserError(f"run folder '{folder}' would be spread over all that is in it: set another one")
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise UserError(f"run folder '{folder}' cannot be written: {error.strerror}; set another one") from None
    return made
