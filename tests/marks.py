"""Marks of tests that need what a machine may lack."""

from __future__ import annotations

import pytest

from megatron_trd.evaluation.sandbox import no_sandbox
from tests import real_input

needs_sandbox = pytest.mark.skipif(no_sandbox() is not None, reason=f"no sandbox: {no_sandbox()}")
# Not part of `make test`: a real model and problems, from packages that ship them.
on_real_input = (
    pytest.mark.slow,
    pytest.mark.skipif(bool(real_input.missing()), reason=f"not installed: {', '.join(real_input.missing())}"),
)
