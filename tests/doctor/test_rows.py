"""Rows of several nodes in one table, and the verdict."""

from __future__ import annotations

import pytest

from megatron_trd.doctor.rows import Row, merge, show


def test_the_lowest_number_stands_for_all_nodes() -> None:
    rows = [(f"n{index}", Row("disk", f"{free} GiB", "1 GiB", value=free)) for index, free in enumerate((7, 3, 5))]
    (line,) = merge(rows)
    assert line.row.found == "3 GiB"
    assert line.nodes == ["n0", "n1", "n2"]


def test_a_node_that_fails_has_a_line_of_its_own() -> None:
    bad = Row("disk", "0 GiB", "1 GiB", "fails", "no room", value=0)
    lines = merge(
        [("n0", Row("disk", "7 GiB", "1 GiB", value=7)), ("n1", bad), ("n2", bad), ("n0", Row("gpus", "8", "8"))]
    )
    assert [(line.row.check, line.row.verdict, line.nodes) for line in lines] == [
        ("disk", "ok", ["n0"]),
        ("disk", "fails", ["n1", "n2"]),
        ("gpus", "ok", ["n0"]),
    ]


def test_nodes_with_different_versions_fail_though_each_is_in_range(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        (node, Row("torch", version, ">=2.8", alike=True))
        for node, version in (("a", "2.8"), ("b", "2.9"), ("c", "2.9"))
    ]
    lines = merge(rows)
    assert show(lines, ranks=3) == 1
    assert "fails on a, b, c: torch differs between nodes: 2.8 on a; 2.9 on b, c" in capsys.readouterr().out
    drivers = [(node, Row("driver", version, "")) for node, version in (("a", "550.1"), ("b", "550.2"))]
    assert show(merge(drivers), ranks=2) == 0


def test_a_warning_is_said_and_does_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        ("a", Row("disk", "9 MB/s", "100 MB/s", "warning", "the disk is slow [really]")),
        ("a", Row("gpus", "8", "8")),
    ]
    assert show(merge(rows), ranks=1) == 0
    output = capsys.readouterr().out
    assert "warning: the disk is slow [really]" in output
    assert "ready: 2 checks, 1 warning" in output
