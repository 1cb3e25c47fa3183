"""Preempted requests of one vLLM engine. Imports vLLM, so import it only where an engine is made."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase


class PreemptionCounter(AggregateStatLoggerBase):
    """A stat logger of one engine; vLLM's own counter is shared by a process and reset by each new engine."""

    def __init__(self) -> None:
        self.count = 0  # requests put back for want of KV cache so far

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Take in a step of the engine."""
        self.count += iteration_stats.num_preempted_reqs if iteration_stats else 0

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
