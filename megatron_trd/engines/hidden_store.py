"""Stores the teacher's hidden states until the student has been trained on them."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_trd import platform
from megatron_trd.config import HiddenPlace
from megatron_trd.data.batching import Sample

WAVE = 8  # micro-batches per replica whose hidden states are computed before they move to host memory or disk


def name_of(sample: Sample, weights: int) -> str:
    """Name of a sample's hidden states under a teacher's weights; names are equal where hidden states are."""
    digest = hashlib.blake2b(f"{weights}/{len(sample.teacher_prompt)}/".encode(), digest_size=20)
    digest.update(array("q", sample.teacher_prompt + sample.response).tobytes())
    return digest.hexdigest()


class HiddenStore:
    """Hidden states `[tokens, hidden_T]` of one step by name: on the device, in pinned host memory or on disk.

    Every rank calls `add` and `keep` with the same names, whether or not it holds the tensors, so that `name in store`
    is the same on all of them.
    """

    def __init__(self, place: HiddenPlace, folder: Path) -> None:
        self.place, self.folder = place, folder
        self._names: set[str] = set()
        self._held: dict[str, Tensor] = {}
        if place == "disk":
            shutil.rmtree(folder, ignore_errors=True)  # left over from a killed process
            folder.mkdir(parents=True)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Register `names` and store those of their tensors that this rank needs."""
        self._names.update(names)
        for name, tensor in tensors.items():
            if self.place == "disk":
                save_file({"hidden": tensor.cpu().contiguous()}, self._file(name))
            else:
                self._held[name] = tensor if self.place == "device" else platform.current().host_copy(tensor)

    def keep(self, names: Iterable[str]) -> None:
        """Drop all but `names`."""
        gone = self._names.difference(names)
        self._names -= gone
        for name in gone:
            self._held.pop(name, None)
            if self.place == "disk":
                self._file(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all files from disk."""
        if self.place == "disk":
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it still contains another rank's folder
                self.folder.parent.rmdir()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the device. Raises `KeyError` if this rank does not need it."""
        device = platform.current().device
        if self.place == "disk":
            if not self._file(name).exists():
                raise KeyError(name)
            return load_file(self._file(name), device=str(device))["hidden"]
        return self._held[name].to(device, non_blocking=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class HiddenStates(Mapping[int, Tensor]):
    """Sample index -> hidden states `[response tokens, hidden_T]`, fetched on access."""

    def __init__(self, store: HiddenStore, names: Sequence[str], mine: Sequence[int]) -> None:
        self._store, self._names, self._mine = store, names, mine

    def __getitem__(self, index: int) -> Tensor:
        return self._store[self._names[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)

    def __len__(self) -> int:
        return len(self._mine)
