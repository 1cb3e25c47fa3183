"""A process that ends with the one that started it; light, for processes that are to start quickly."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None) -> bool:
    """Have this process killed when the thread that started it ends, whatever it is doing then.

    parent: the process of that thread, where it is known. False if it has gone already: no signal will come.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return parent in (None, os.getppid())
