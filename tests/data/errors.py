"""What every message to the user has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_trd.errors import UserError


def user_error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the `UserError` that a call raises: one line, not a traceback's worth."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.strip(), "says nothing"
    assert len(message.splitlines()) == 1, message
    assert len(message) < 600, message
    assert caught.value.exit_code == 2
    return message
