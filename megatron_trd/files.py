"""Folders that are written atomically, and checksums to verify them later.

A folder is written next to its target as `.NAME.partial`, flushed to disk, and renamed. Its `B3SUMS` has one line per
file, in the format of `b3sum`: BLAKE3, because a checksum that is slower than the disk would not be used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from megatron_trd.errors import UserError

SUMS = "B3SUMS"
_BLOCK = 2**22  # bytes of a file that are hashed at once
_SYNC_BYTES = 2**27  # bytes of a file that are written between syncs to the disk
_MARGIN = 2**26  # bytes to leave free on a disk, for the folder's small files


class HashedFile:
    """A new file written sequentially; its own threads hash it and sync it to disk meanwhile."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb", buffering=0)
        self._hash = blake3()
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._synced = 0  # bytes written when the last sync began
        self._sync: Future[Any] | None = None
        self._pending: Future[Any] | None = None
        self.error: OSError | None = None  # why a write failed

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, which must not change until the next write or flush."""
        self.flush()
        view = memoryview(data).cast("B")
        try:
            self._append(view)
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def _append(self, view: memoryview) -> None:
        # Small pieces are not worth a thread, and the caller may reuse their buffer.
        self._pending = self._hasher.submit(self._hash.update, view) if len(view) >= 2**16 else None
        if self._pending is None:
            self._hash.update(view)
        rest = view
        while rest:
            rest = rest[self._file.write(rest) :]
        if self.tell() - self._synced >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._end_sync()
            self._synced = self.tell()
            self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())

    def _end_sync(self) -> None:
        """Raise the error of the last sync, if any: the system reports it only once, not to the next sync."""
        if self._sync is not None:
            self._sync.result()

    def flush(self) -> None:
        """Wait until written data is hashed; its memory may change afterwards."""
        if self._pending is not None:
            self._pending.result()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> str:
        """Sync the file to disk; returns its BLAKE3 hash. Raises `OSError` if any of it may be missing there."""
        self._hasher.shutdown()
        self._syncer.shutdown()
        with self._file:
            self._end_sync()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()


@contextlib.contextmanager
def whole_folder(target: Path, *, size: int, force: bool = False) -> Iterator[Path]:
    """A new, empty folder that becomes `target` when the block ends, and is removed if the block fails.

    `size`: bytes that will be written. `force`: replace an existing folder. A link is kept and leads to the new folder.
    Raises `UserError` if the target exists, the disk is too small, or another process is writing the same target.
    """
    target = target.resolve()
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with _lock(partial.with_suffix(".lock"), target):
            replaced = _replaced(target)
            if replaced.exists() and not target.exists():  # a process was killed between two renames: see put_in_place
                replaced.rename(target)
            if target.exists() and not force:
                raise UserError(f"'{target}' exists already; give another folder, or --force to replace it")
            if target.exists() and not target.is_dir():
                raise UserError(f"'{target}' is a file; give the name of a folder")
            _check_room(target, size)
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir()
            try:
                yield partial
                put_in_place(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"'{target}' is not written: {error.filename or target}: {error.strerror or error}") from None
    finally:
        for parent in missing:  # deepest first; non-empty ones are kept
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size + _MARGIN > free:
        raise UserError(
            f"'{target}' needs {size / 1e9:.2f} GB, the disk of '{target.parent}' has {free / 1e9:.2f} GB left: "
            "free some or give a folder on another disk"
        )


@contextlib.contextmanager
def _lock(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock file, which is released if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not path.samefile(f"/proc/self/fd/{file.fileno()}"):
                raise BlockingIOError  # its holder has just released and removed it
        except BlockingIOError:
            raise UserError(f"'{target}' is being written by another process; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # some cluster file systems lack it
                raise
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a folder to its final name once all of it is on disk.

    A folder that is replaced is moved aside first and removed last, so that one of the two always exists.
    """
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: even if this process is killed, readers see the old or the new content, never a part."""
    replace_lines(path, [text])


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file's lines as they come, atomically: after an error in one, the file is as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def files_of(folder: Path) -> list[str]:
    """Names, relative to `folder`, of the files that its checksums cover."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SUMS)


def digest(path: Path) -> str:
    """BLAKE3 hash of a file, in hexadecimal."""
    value = blake3()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            value.update(block[:count])
    return value.hexdigest()


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the checksums of a folder's files; `known` holds digests of files that need not be read again."""
    known = known or {}
    lines = [f"{known.get(name) or digest(folder / name)}  {name}\n" for name in files_of(folder)]
    (folder / SUMS).write_text("".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> BLAKE3 hash as recorded; empty for a folder without checksums."""
    if not (folder / SUMS).is_file():
        return {}
    sums = {}
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        value, _, name = line.partition("  ")
        if len(value) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"'{folder / SUMS}' is damaged: {line[:80]!r} is not a checksum and a file name")
        sums[name] = value
    return sums


def check_sums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Compare files with their recorded checksums: those of `names`, or all. Reads every byte.

    Does nothing for a folder without checksums. Raises `UserError` naming the first file that is missing or differs.
    """
    for name, value in read_sums(folder).items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"'{folder}' lacks its file {name}: copy the folder again")
        if digest(path) != value:
            raise UserError(
                f"'{path}' is damaged: its checksum differs from {SUMS}; copy the folder again "
                f"(or remove {SUMS}, if you changed the file yourself)"
            )


def check_small_sums(folder: Path) -> None:
    """`check_sums` of all files but the weights, for use before they are parsed."""
    check_sums(folder, [name for name in read_sums(folder) if not name.endswith((".distcp", ".safetensors"))])


@contextlib.contextmanager
def checked(folder: Path) -> Iterator[None]:
    """Run `check_sums` on a whole folder while the block reads it; raises at the end of the block at the latest."""
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_sums, folder)
        try:
            yield
        except UserError:
            check.result()  # damage is the better explanation of any error
            raise
        check.result()
