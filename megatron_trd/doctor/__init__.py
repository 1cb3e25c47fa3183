"""`megatron-trd doctor`: checks whether this node, or every node of an allocation, is fit for a job."""

from __future__ import annotations

import os
import tempfile

from megatron_trd.errors import UserError


def prepare() -> None:
    """Set what torch reads when it is imported. Raises `UserError` if it cannot be imported at all."""
    # A missing rank becomes a row of the table, not pages of C++ stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}: set TMPDIR to a folder that can be written") from None
