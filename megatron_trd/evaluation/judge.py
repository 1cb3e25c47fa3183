"""A process that compares mathematical expressions: `python -m megatron_trd.evaluation.judge ASKER`, a process id.

Reads one JSON pair `[wanted, found]` per line and writes `true` or `false`. It is separate from the trainer because a
model may write `10^{10^{10}}`, which computer algebra evaluates until memory or time runs out; the caller then kills
this process. It also ends if the caller is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys

from megatron_trd.parent import end_with_parent

_MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Answer until the caller closes the pipe, or the thread of it that started this process ends."""
    if not end_with_parent(int(sys.argv[1])):  # also during an endless evaluation
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(most, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not look like an answer
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        print(json.dumps(_equal(*json.loads(line))), file=answers, flush=True)


def _equal(wanted: str, found: str) -> bool:
    from math_verify import parse, verify

    with contextlib.suppress(Exception, MemoryError):  # sympy raises many kinds of errors on bad input: not equal
        # Their own time limits are signals, which do not interrupt a power of long integers; ours kills the process.
        boxed = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, found))
        return bool(verify(*boxed, timeout_seconds=None))
    return False


if __name__ == "__main__":
    main()
