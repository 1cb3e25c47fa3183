"""Stop requests: a run that receives one finishes its step, saves and ends."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_trd import platform

# Ctrl-C, a scheduler's stop, and the warning that a SLURM job can request ahead of its time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Records that a stop signal arrived, and lets all ranks agree on it between steps."""

    def __init__(self) -> None:
        self._received = False
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        # SLURM sends the warning to every process of a job's step, and it would kill the children of this one, which
        # inherit the blocked signal. In this process another thread receives it, or it stays pending.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        received = self._received or signal.SIGUSR1 in signal.sigpending()
        flag = torch.tensor([received], dtype=torch.int32, device=platform.current().device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
