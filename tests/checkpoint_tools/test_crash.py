"""Conversions that are killed, that fail, that meet, and files that are damaged afterwards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

import megatron_trd.files
from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd.errors import UserError
from megatron_trd.files import SUMS, HashedFile, replace_text, whole_folder
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.megatron_folder import MegatronFolder
from tests.checkpoint_tools.commands import Tool, last_line, says
from tests.checkpoint_tools.folders import assert_same_model, cut, flip, snapshot, tensors, write_bits
from tests.weights.bits import same_bits

COMMANDS = {"hf-to-megatron": "--hf", "megatron-to-hf": "--megatron"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `megatron` and the folder `hf` of two shards that it was converted into, for copying."""
    root = tmp_path_factory.mktemp("whole")
    write_bits(root / "source", vocab_size=130, num_hidden_layers=2)
    hf_to_megatron.convert(root / "source", root / "megatron")
    megatron_to_hf.convert(root / "megatron", root / "hf", max_shard_bytes=150_000)
    return root


# Kills

# Runs `megatron-trd convert`, says "here" and stands still: after so many bytes, or before the renaming of that number.
STANDS_STILL = """
import sys, time
from pathlib import Path
from megatron_trd import cli
from megatron_trd.files import HashedFile

after_bytes, before_rename = int(sys.argv[1]), int(sys.argv[2])
sys.argv[1:3] = ["convert"]
counts = {"bytes": 0, "renames": 0}
write, rename = HashedFile.write, Path.rename

def stand_still():
    print("here", flush=True)
    time.sleep(100)

def counted_write(self, data):
    done = write(self, data)
    counts["bytes"] += done
    if counts["bytes"] >= after_bytes:
        stand_still()
    return done

def counted_rename(self, target):
    counts["renames"] += 1
    if counts["renames"] == before_rename:
        stand_still()
    return rename(self, target)

HashedFile.write, Path.rename = counted_write, counted_rename
cli.main()
"""


@contextlib.contextmanager
def standing_still(*arguments: object, after_bytes: int = 10**12, before_rename: int = 0) -> Iterator[None]:
    """A process that is in the middle of a conversion while the block runs, and is killed at its end."""
    command = [sys.executable, "-c", STANDS_STILL, str(after_bytes), str(before_rename), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n", process.communicate()
        yield
    finally:
        process.kill()  # SIGKILL: it has no chance to tidy up
        process.communicate()


def loads(folder: Path) -> list[str]:
    """What takes a folder for a model."""
    from transformers import AutoModelForCausalLM

    found = []
    with contextlib.suppress(UserError):
        MegatronFolder(folder)
        found.append("MegatronFolder")
    with contextlib.suppress(UserError):
        ModelFolder(folder)
        found.append("ModelFolder")
    with contextlib.suppress(Exception):  # which of many kinds is up to transformers
        AutoModelForCausalLM.from_pretrained(folder)
        found.append("transformers")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_conversion_that_is_killed_leaves_nothing_that_loads(
    whole: Path, tmp_path: Path, tool: Tool, command: str
) -> None:
    kind = COMMANDS[command].removeprefix("--")
    arguments = [command, COMMANDS[command], whole / kind, "--out", tmp_path / "out"]
    with standing_still(*arguments, after_bytes=100_000):
        partial = snapshot(tmp_path)
        says(tool(*arguments), [str(tmp_path / "out"), "being written by another process"])
        assert snapshot(tmp_path) == partial, "the second changes nothing of the first"
    assert snapshot(tmp_path) == partial, "the kill came before the end, and nothing cleaned up"
    assert max(len(data or b"") for data in partial.values()) >= 50_000, "tensors had been written"
    left = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert left
    assert tmp_path / "out" not in left
    for folder in left:
        assert not loads(folder), folder

    assert tool(*arguments).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the next run tidies up"
    assert loads(tmp_path / "out")
    assert (
        tool(
            "verify",
            *(
                ["--hf", whole / "hf", "--megatron", tmp_path / "out"]
                if kind == "hf"
                else ["--hf", tmp_path / "out", "--megatron", whole / "megatron"]
            ),
        ).code
        == 0
    )


def test_a_kill_while_a_folder_is_replaced_loses_neither_of_the_two(
    whole: Path, tmp_path: Path, megatron: Path, tool: Tool
) -> None:
    old = write_bits(tmp_path / "out", family="llama", vocab_size=130, num_hidden_layers=1)
    before = tensors(old)
    arguments = ["megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out", "--force"]
    with standing_still(*arguments, before_rename=2):  # the old one is out of the way, the new one not in its place
        pass
    folders = [path for path in tmp_path.iterdir() if path.is_dir() and path != megatron]
    found = [tensors(folder) for folder in folders]
    assert any(
        content.keys() == before.keys() and all(same_bits(content[n], before[n]) for n in before) for content in found
    )
    assert any("lm_head.weight" in content and content.keys() == tensors(whole / "hf").keys() for content in found)
    assert tool(*arguments).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "out"]
    assert_same_model(whole / "hf", tmp_path / "out")


# Failures


@pytest.mark.parametrize("command", COMMANDS)
def test_a_conversion_that_fails_leaves_the_old_folder(
    hf: Path, megatron: Path, tmp_path: Path, tool: Tool, command: str
) -> None:
    arguments = [command, COMMANDS[command], tmp_path / COMMANDS[command].removeprefix("--"), "--out", tmp_path / "out"]
    assert tool(*arguments).code == 0
    flip(next(arguments[2].glob("*.distcp" if command == "megatron-to-hf" else "model-00002*")))
    before = snapshot(tmp_path)
    says(last_line(tool(*arguments, "--force")), ["damaged"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_program_error_leaves_nothing_either(
    hf: Path, megatron: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    def fail(self: HashedFile) -> str:
        raise ZeroDivisionError

    before = snapshot(tmp_path)
    monkeypatch.setattr(HashedFile, "close", fail)
    with pytest.raises(ZeroDivisionError):
        tool(command, COMMANDS[command], tmp_path / COMMANDS[command].removeprefix("--"), "--out", tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fails_behind_a_write_is_heard(
    hf: Path, megatron: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    """What a file system says of blocks it could not write, it says once: to whoever asks first."""

    def fail(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    before = snapshot(tmp_path)
    monkeypatch.setattr(megatron_trd.files, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    arguments = [command, COMMANDS[command], tmp_path / COMMANDS[command].removeprefix("--"), "--out", tmp_path / "out"]
    says(last_line(tool(*arguments)), ["out' is not written", "quota"])
    assert snapshot(tmp_path) == before


def test_a_folder_that_another_process_is_replacing_is_left_to_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with whole_folder(target, size=0, force=True) as partial:
        (partial / "new").touch()
        target.rename(tmp_path / ".model.replaced")  # as it does just before the new one takes its place
        with pytest.raises(UserError, match="written by another process"), whole_folder(target, size=0):
            pass
        assert not target.exists()
        (tmp_path / ".model.replaced").rename(target)
    assert [path.name for path in target.iterdir()] == ["new"]


def test_whoever_reads_a_text_while_it_is_replaced_reads_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    with path.open() as reader:
        replace_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", COMMANDS)
def test_force_replaces_all_of_the_old_folder(
    hf: Path, megatron: Path, tmp_path: Path, tool: Tool, command: str
) -> None:
    arguments = [command, COMMANDS[command], tmp_path / COMMANDS[command].removeprefix("--"), "--out"]
    assert tool(*arguments, tmp_path / "fresh").code == 0
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "old.txt").write_text("old")
    assert tool(*arguments, tmp_path / "out", "--force").code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "hf", "megatron", "out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_a_link_stays_one(hf: Path, megatron: Path, tmp_path: Path, tool: Tool, command: str) -> None:
    arguments = [command, COMMANDS[command], tmp_path / COMMANDS[command].removeprefix("--"), "--out"]
    assert tool(*arguments, tmp_path / "fresh").code == 0
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "out").symlink_to("../disk/model")  # which is not there yet
    for force in ([], ["--force"], ["--force"]):
        assert tool(*arguments, tmp_path / "links" / "out", *force).code == 0
        assert (tmp_path / "links" / "out").is_symlink()
        assert snapshot(tmp_path / "disk" / "model") == snapshot(tmp_path / "fresh")
        assert [path.name for name in ("links", "disk") for path in (tmp_path / name).iterdir()] == ["out", "model"]
    says(tool(*arguments, tmp_path / "links" / "out"), [str(tmp_path / "disk" / "model"), "exists"])


def test_two_conversions_into_two_folders_do_not_meet(whole: Path, tmp_path: Path, tool: Tool) -> None:
    arguments = ["hf-to-megatron", "--hf", whole / "hf", "--out"]
    (tmp_path / ".b.partial").mkdir()  # what a killed one left
    (tmp_path / ".b.partial" / "__0_0.distcp").write_bytes(b"rest")
    assert tool(*arguments, tmp_path / "a").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.partial", "a"]
    assert tool(*arguments, tmp_path / "b").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# Damage


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


MEGATRON_FILES = [
    ".metadata",
    "__0_0.distcp",
    "common.pt",
    "hf/chat_template.jinja",
    "hf/config.json",
    "hf/generation_config.json",
    "hf/tokenizer.json",
    "hf/tokenizer_config.json",
    "metadata.json",
]
HF_FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_every_file_of_an_output_has_its_checksum(whole: Path) -> None:
    for folder, names in ((whole / "megatron", MEGATRON_FILES), (whole / "hf", HF_FILES)):
        assert files(folder) == sorted([*names, SUMS])
        lines = [f"{blake3((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
        assert sorted((folder / SUMS).read_text().splitlines()) == sorted(lines)


@pytest.mark.skipif(shutil.which("b3sum") is None, reason="no b3sum on this machine")
def test_checksums_are_in_the_form_of_b3sum(whole: Path) -> None:
    for folder in (whole / "megatron", whole / "hf"):
        subprocess.run(["b3sum", "--check", SUMS], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("name", MEGATRON_FILES)
@pytest.mark.parametrize("command", ["megatron-to-hf", "verify"])
def test_a_damaged_file_of_a_checkpoint_is_found_and_named(
    whole: Path, megatron: Path, tmp_path: Path, tool: Tool, command: str, name: str
) -> None:
    arguments = [command, "--megatron", megatron]
    arguments += ["--hf", whole / "hf"] if command == "verify" else ["--out", tmp_path / "out"]
    check_damage(megatron / name, arguments, tmp_path, tool)


@pytest.mark.parametrize("name", HF_FILES)
@pytest.mark.parametrize("command", ["hf-to-megatron", "verify"])
def test_a_damaged_file_of_a_folder_is_found_and_named(
    whole: Path, hf: Path, tmp_path: Path, tool: Tool, command: str, name: str
) -> None:
    arguments = [command, "--hf", hf]
    arguments += ["--megatron", whole / "megatron"] if command == "verify" else ["--out", tmp_path / "out"]
    check_damage(hf / name, arguments, tmp_path, tool)


def check_damage(path: Path, arguments: list[object], folder: Path, tool: Tool) -> None:
    """A flipped bit anywhere in a file, and a lost half, and a lost file."""
    data = path.read_bytes()
    for damage in (0.0, 0.3, 0.6, 0.999, "cut", "gone"):
        if damage == "gone":
            path.unlink()
        elif isinstance(damage, float):
            flip(path, damage)
        else:
            cut(path)
        before = snapshot(folder)
        done = tool(*arguments)
        assert done.code == 2, (damage, done)
        says(last_line(done), [path.name])
        assert snapshot(folder) == before
        path.write_bytes(data)
    assert tool(*arguments).code == 0, "whole again"


def test_damage_that_no_checksum_tells_of_is_an_error_or_none(whole: Path, megatron: Path, tmp_path: Path) -> None:
    # A checkpoint of megatron-core's own has no checksums: its index may say anything.
    (megatron / SUMS).unlink()
    data, expected = (megatron / ".metadata").read_bytes(), tensors(whole / "hf")
    places = random.Random(0)
    refused = 0
    for _ in range(80):
        damaged = bytearray(data)
        damaged[places.randrange(len(data))] ^= 1 << places.randrange(8)
        (megatron / ".metadata").write_bytes(damaged)
        try:
            megatron_to_hf.convert(megatron, tmp_path / "out", force=True)
        except UserError:
            refused += 1
            continue
        found = tensors(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
    assert refused > 40


def test_a_folder_that_a_killed_conversion_had_moved_aside_comes_back(hf: Path, tmp_path: Path, tool: Tool) -> None:
    out = tmp_path / "out"
    hf_to_megatron.convert(hf, out)
    before = snapshot(out)
    out.rename(tmp_path / ".out.replaced")  # where it is between the two renames
    says(tool("hf-to-megatron", "--hf", hf, "--out", out), [str(out), "exists"])
    assert snapshot(out) == before


def test_a_file_system_without_locks_will_do(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    hf_to_megatron.convert(hf, tmp_path / "out")
    assert MegatronFolder(tmp_path / "out").arch.layers == 2
