"""`megatron-trd doctor` as users and job scripts start it."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_trd.config import apply_overrides
from megatron_trd.doctor.network import Meeting, Place
from megatron_trd.training.checks import check
from recipes import opsd_demo
from tests.data.errors import user_error
from tests.test_cli import run

DOCTOR = [sys.executable, "-m", "megatron_trd.cli", "doctor"]
TIMEOUT = 3  # seconds that the doctor of a broken job waits for ranks

# The doctor of a machine whose ranks compute by another backend than gloo; its argument is the card for gloo.
_OTHER_BACKEND = """
import os, sys
import torch.distributed as dist
from megatron_trd import cli, platform

platform.current().backend = "cpu:gloo"  # the one there is here, by another name
new_group = dist.new_group

def by_card(*arguments, **options):
    os.environ["GLOO_SOCKET_IFNAME"] = card
    return new_group(*arguments, **options)

dist.new_group = by_card
card, sys.argv = sys.argv[1], ["megatron-trd", "doctor", "--quick"]
cli.main()
"""


def start(*arguments: str, files: int | None = None, **environment: str) -> subprocess.Popen[str]:
    """The command with its output in a pipe, one line for a row of the table; `files`: its ulimit -n."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"} | environment,
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    try:
        output, error = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == code, output + error
    assert "Traceback" not in output + error
    return output


def row(output: str, check: str) -> str:
    """The one row of a check."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"│ {check} ")]
    return line


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_of_two(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def test_a_healthy_machine_passes_and_its_network_is_measured(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    output = finish(start(*DOCTOR, "opsd_demo", f"run_dir={run_dir}"), 0)
    milliseconds, bandwidth = re.findall(r"2 ranks, ([\d.]+) ms, ([\d.]+) GB/s", row(output, "all-reduce"))[0]
    assert float(milliseconds) > 0
    assert float(bandwidth) > 0
    assert float(re.findall(r"([\d.]+) MB/s", row(output, "run folder"))[0]) > 0
    assert "2048 problems, 2 ranks" in row(output, "recipe")
    assert "not needed on a CPU" in row(output, "GPUs")
    assert " fails " not in output
    assert "ready: 15 checks" in output.splitlines()[-1]
    assert not run_dir.parent.exists(), "a check leaves nothing behind"


def test_every_fault_of_a_machine_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    faults = ["model=nowhere", f"run_dir={tmp_path / 'file' / 'run'}"]
    output = finish(start(*DOCTOR, "opsd_demo", *faults, "--quick", files=256, TMPDIR="/proc/nowhere"), 1)
    lines = output.splitlines()
    assert f"fails: {user_error(check, apply_overrides(opsd_demo.recipe(), faults))}" in lines, "as train says it"
    assert f"fails: run folder '{tmp_path}/file/run' cannot be written: Not a directory; set another run_dir=" in lines
    (line,) = [line for line in lines if "may open 256 files" in line]
    assert "ulimit -n 65536" in line
    assert "fails: temporary folder '/proc/nowhere' (TMPDIR) cannot be written: make it" in output
    assert lines[-1].startswith("not ready: ")
    for check_name in ("open files", "run folder", "temporary folder", "recipe"):
        assert " fails " in row(output, check_name)
    assert "2 ranks" in row(output, "all-reduce"), "the rest is checked all the same"


def test_two_ranks_of_torchrun_print_one_table() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    output = finish(start(*command, *DOCTOR[1:], "--quick"), 0)
    assert output.count("ready: ") == 1
    assert "2 ranks" in row(output, "all-reduce")
    assert "1 node, 2 ranks" in output


def test_a_peer_that_never_comes_is_a_row() -> None:
    begin = time.monotonic()
    process = start(*DOCTOR, "--quick", f"--timeout={TIMEOUT}", **one_of_two(0))
    output = finish(process, 1)
    assert time.monotonic() - begin < 60
    assert f"rank 1 did not come within {TIMEOUT} s" in output
    assert " fails " in row(output, "all-reduce")


def test_a_rank_without_rank_0_says_so() -> None:
    output = finish(start(*DOCTOR, "--quick", f"--timeout={TIMEOUT}", **one_of_two(1)), 1)
    assert "rank 1 cannot reach rank 0 at 127.0.0.1" in output


def test_a_peer_that_comes_and_then_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = one_of_two(0)
    process = start(*DOCTOR, "--quick", f"--timeout={TIMEOUT}", SLURMD_NODENAME="n0", **environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    while process.poll() is None:  # until it serves the store
        try:
            socket.create_connection(("127.0.0.1", int(environment["MASTER_PORT"]))).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    meeting = Meeting(Place(rank=1, world=2, local_rank=0, local_world=1, node="n1"), seconds=60)
    assert meeting.missing() == []
    output = finish(process, 1)
    assert f"rank 1 (n1) gave no answer; rank 0 (n0) did not finish within {TIMEOUT} s" in output


@pytest.mark.parametrize(("card", "code", "says"), [("lo", 0, "2 ranks, "), ("nowhere", 1, "fails for 2 of 2 ranks")])
def test_gloo_is_tried_where_ranks_compute_by_another_backend(card: str, code: int, says: str) -> None:
    environment = one_of_two(0)
    first, second = (
        start(sys.executable, "-c", _OTHER_BACKEND, card, **environment | {"RANK": str(rank)}) for rank in range(2)
    )
    output = finish(first, code)
    finish(second, 0)
    assert says in row(output, "all-reduce")
    assert ("failed by gloo: " in output) == (code == 1)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["opsd_dmo"], {}, ["opsd_dmo", "opsd_demo"]),
        (["opsd_demo", "stepz=1"], {}, ["stepz", "did you mean"]),
        ([], {"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ([], {"RANK": "two", "WORLD_SIZE": "2"}, ["RANK=two", "not a number"]),
        ([], {"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 is not one of WORLD_SIZE=2 ranks"]),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set"]),
        (["--ranks", "2"], {"RANK": "0", "WORLD_SIZE": "2"}, ["--ranks", "leave it out"]),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    environment: dict[str, str],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, error = run(["doctor", *arguments], monkeypatch, capsys)
    assert code == 2
    assert len(error.splitlines()) == 1
    for part in says:
        assert part in error
