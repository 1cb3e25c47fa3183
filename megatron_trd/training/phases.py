"""Cost of the phases of a step: seconds, and peak memory in each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_trd import platform


class Phases:
    """Clock and memory gauge of this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # of the step so far, by phase
        self._peaks: dict[str, float] = {}  # GiB of the step so far, by metric
        self._largest: dict[str, float] = {}  # GiB of the run so far, by kind of memory

    @contextmanager
    def measure(self, name: str, *, out_of: str | None = None) -> Iterator[None]:
        """Measure a part of the step; parts of the same name add up. Memory of a nested phase counts for it alone.

        Its time counts for both phases, unless `out_of` names the enclosing one, from which it is then subtracted.
        """
        current = platform.current()
        current.synchronize()
        self._gauge(out_of)
        begin = time.perf_counter()
        yield
        current.synchronize()
        seconds = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if out_of is not None:
            self.seconds[out_of] = self.seconds.get(out_of, 0.0) - seconds
        self._gauge(name)

    def _gauge(self, name: str | None) -> None:
        """Read the peaks since the last call, and count them for a phase."""
        for kind, gib in platform.current().peak_memory_gib().items():
            self._largest[kind] = max(self._largest.get(kind, 0.0), gib)
            if name is not None:
                key = f"memory/{name}/{kind}_gib"
                self._peaks[key] = max(self._peaks.get(key, 0.0), gib)

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics and begin the next step."""
        values = {f"time/{name}": seconds for name, seconds in self.seconds.items()} | self._peaks
        values |= {f"memory/{kind}_gib": gib for kind, gib in self._largest.items()}
        self.seconds, self._peaks = {}, {}
        return values
