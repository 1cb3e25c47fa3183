"""A rollout y_o beside its refinement y_r, line by line."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_trd.errors import UserError
from megatron_trd.reporting.metrics import sample_files

Mark = Literal["", "slip", "after", "changed"]

# Limit on pairs of equal lines of two texts up to which their order is considered. The time for that grows faster than
# their number: a loop of two lines over a whole response would take many minutes.
_MOST_EQUAL = 20_000


@dataclass(frozen=True)
class Line:
    """A numbered line (from 1) and its mark: the first wrong line, one that follows it, or one that refinement
    changed."""

    number: int
    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Pair:
    """A problem with both texts. `*_right` is None where there was no answer to grade against."""

    problem: str
    answer: str | None
    reference: str | None
    rollout: list[Line]
    refinement: list[Line]
    rollout_right: bool | None
    refinement_right: bool | None


def make_pair(values: dict[str, Any]) -> Pair:
    """A pair from a record of the sample files, with `first_wrong_line` (index from 0) where known."""
    before, after = values["rollout"].splitlines(), values["refinement"].splitlines()
    return Pair(
        problem=values["problem"],
        answer=values.get("answer"),
        reference=values.get("reference"),
        rollout=_rollout_lines(before, values.get("first_wrong_line")),
        refinement=_refinement_lines(before, after),
        rollout_right=values.get("rollout_right"),
        refinement_right=values.get("refinement_right"),
    )


def newest_pairs(folder: Path) -> list[dict[str, Any]]:
    """Pairs of the last step in a run's `samples/`; empty if the run kept none or does not refine."""
    files = sample_files(folder)
    if not files:
        return []
    _, newest = files[-1]
    try:
        lines = newest.read_text(encoding="utf-8").splitlines()
        return with_refinement([json.loads(line) for line in lines])
    except ValueError as error:
        raise UserError(f"'{newest}' cannot be read ({error}): remove it") from None


def with_refinement(pairs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs whose rollout was refined."""
    return [pair for pair in pairs if pair.get("refinement") is not None]


def _rollout_lines(before: list[str], first_wrong: int | None) -> list[Line]:
    if first_wrong is not None and first_wrong >= len(before):  # the line that should come next is missing
        before = [*before, ""]
        first_wrong = len(before) - 1

    def mark(index: int) -> Mark:
        if first_wrong is None or index < first_wrong:
            return ""
        return "slip" if index == first_wrong else "after"

    return [Line(index + 1, text, mark(index)) for index, text in enumerate(before)]


def _refinement_lines(before: list[str], after: list[str]) -> list[Line]:
    """Lines of the refinement; those that are not in the rollout are marked as changed."""
    kept = kept_lines(before, after)
    return [Line(index + 1, text, "" if index in kept else "changed") for index, text in enumerate(after)]


def kept_lines(before: list[str], after: list[str]) -> set[int]:
    """Indices of the lines of `after` that are in `before`, in its order; in any order if both texts consist of a few
    repeated lines."""
    counts, others = Counter(before), Counter(after)
    if sum(count * others[line] for line, count in counts.items()) > _MOST_EQUAL:
        kept = set()
        for index, line in enumerate(after):
            if counts[line] > 0:
                counts[line] -= 1
                kept.add(index)
        return kept
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return {index for block in blocks for index in range(block.b, block.b + block.size)}
