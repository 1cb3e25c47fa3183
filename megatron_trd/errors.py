"""Errors with messages for the user."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """

    exit_code = 2


class JobFailed(UserError):
    """A job that was started has failed; the message says which part, and why."""

    exit_code = 1


def line_of(error: BaseException, length: int = 300) -> str:
    """The message of another library's error, in one line of at most `length` characters."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def in_one_line(command: Callable[[], object], program: str) -> None:
    """Run a command; a `UserError` is printed in one line and sets the exit code, without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
