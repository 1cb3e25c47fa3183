"""Input that cannot be converted: one line that says why, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from checkpoint_tools import common, hf_to_megatron, megatron_to_hf
from megatron_trd.errors import UserError
from megatron_trd.files import SUMS
from megatron_trd.models.dist_checkpoint import CheckpointReader
from tests.checkpoint_tools.commands import Tool, last_line, process, says
from tests.checkpoint_tools.folders import (
    Malicious,
    assert_same_model,
    configure,
    cut,
    rewrite,
    snapshot,
    tensors,
    write_bits,
)
from tests.models import write_model

UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder `hf` and its checkpoint `megatron`, for copying."""
    root = tmp_path_factory.mktemp("whole")
    write_bits(root / "hf", vocab_size=130, num_hidden_layers=2)
    hf_to_megatron.convert(root / "hf", root / "megatron")
    return root


@pytest.fixture
def refused(tool: Tool, tmp_path: Path) -> Callable[..., None]:
    """Checks that a command is refused in one line with `parts` in it, and changes not one file."""

    def check(*arguments: object, parts: list[str]) -> None:
        before = snapshot(tmp_path)
        says(tool(*arguments), parts)
        assert snapshot(tmp_path) == before

    return check


Refused = Callable[..., None]


# Hugging Face folders


def without(*names: str) -> Break:
    return lambda folder: rewrite(folder, {k: v for k, v in tensors(folder).items() if k not in names})


def with_tensor(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Break:
    def change(folder: Path) -> None:
        content = tensors(folder)
        rewrite(folder, content | {name: make(content)})

    return change


def with_index(change: Callable[[dict[str, str]], dict[str, str]]) -> Break:
    """An index of the folder's one file, changed."""

    def write(folder: Path) -> None:
        weight_map = change(dict.fromkeys(tensors(folder), "model.safetensors"))
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def instead(name: str) -> Break:
    """Weights under another file's name."""
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def with_more_than_the_index_says(folder: Path) -> None:
    with_index(lambda weight_map: weight_map)(folder)
    with_tensor("model.layers.0.mlp.bonus.weight", lambda _: torch.ones(3))(folder)


BAD_FOLDERS: dict[str, tuple[Break, list[str]]] = {
    "missing tensor": (without(UP), [UP, "missing"]),
    "missing bias": (
        lambda folder: configure(folder, architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        ["q_proj.bias", "missing"],
    ),
    "extra tensor": (
        with_tensor("model.layers.0.self_attn.q_proj.bias", lambda _: torch.ones(144)),
        ["model.layers.0.self_attn.q_proj.bias", "Qwen3ForCausalLM"],
    ),
    "extra layer": (
        with_tensor("model.layers.2.input_layernorm.weight", lambda _: torch.ones(42)),
        ["model.layers.2.input_layernorm.weight"],
    ),
    "tensor that the index does not name": (with_more_than_the_index_says, ["model.layers.0.mlp.bonus.weight"]),
    "head of another shape": (
        with_tensor("lm_head.weight", lambda content: content["lm_head.weight"][:-1]),
        ["lm_head.weight", "[129, 42]", "[130, 42]"],
    ),
    "transposed tensor": (with_tensor(UP, lambda content: content[UP].t()), [UP, "[42, 50]", "[50, 42]"]),
    "flat tensor": (with_tensor(UP, lambda content: content[UP].view(-1)), [UP, "[2100]", "[50, 42]"]),
    "number for a tensor": (with_tensor("model.norm.weight", lambda _: torch.tensor(1.0)), ["model.norm.weight", "[]"]),
    "unknown architecture": (
        lambda folder: configure(folder, architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", "not supported", "Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen2ForCausalLM"],
    ),
    "unknown model type": (lambda folder: configure(folder, model_type="qwen99"), ["config.json", "qwen99"]),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "broken configuration": (text("config.json", '{"model_type": "qwen3"'), ["config.json"]),
    "index that names a missing shard": (
        with_index(lambda weight_map: weight_map | {UP: "model-00002-of-00002.safetensors"}),
        ["model-00002-of-00002.safetensors", "missing"],
    ),
    "index that names the wrong shard": (
        lambda folder: (
            save_file({"other": torch.ones(1)}, folder / "other.safetensors"),
            with_index(
                lambda weight_map: {name: weight_map.get(name, "") for name in weight_map} | {UP: "other.safetensors"}
            )(folder),
        ),
        [UP, "other.safetensors", "lacks"],
    ),
    "index that leads outside": (
        with_index(lambda weight_map: weight_map | {UP: "../hf/model.safetensors"}),
        [INDEX, "not the name of a file in this folder"],
    ),
    "index that leads to the root": (
        with_index(lambda weight_map: weight_map | {UP: "/etc/passwd"}),
        [INDEX, "not the name of a file in this folder"],
    ),
    "index that leads upwards": (with_index(lambda weight_map: weight_map | {UP: ".."}), [".."]),
    "index of numbers": (with_index(lambda weight_map: dict.fromkeys(weight_map, 1)), [INDEX]),  # type: ignore[arg-type]
    "index that is a list": (text(INDEX, "[]"), [INDEX, "weight_map"]),
    "index that is no JSON": (text(INDEX, "{"), [INDEX, "weight_map"]),
    "file cut in its tensors": (lambda folder: cut(folder / "model.safetensors", 0.5), ["model.safetensors", "read"]),
    "file cut in its header": (lambda folder: cut(folder / "model.safetensors", 0.001), ["model.safetensors", "read"]),
    "empty file": (lambda folder: cut(folder / "model.safetensors", 0), ["model.safetensors", "read"]),
    "pickle .bin": (instead("pytorch_model.bin"), ["pytorch_model.bin", "convert it to safetensors"]),
    "pickle .pt": (instead("model.pt"), ["model.pt", "convert it to safetensors"]),
    "pickle named safetensors": (
        lambda folder: torch.save({UP: torch.ones(1)}, folder / "model.safetensors"),
        ["model.safetensors", "read"],
    ),
    "shard without its index": (instead("model-00001-of-00002.safetensors"), [INDEX]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no weights"]),
    "other dtype in one layer": (
        with_tensor(UP, lambda content: content[UP].bfloat16()),
        [UP, "torch.bfloat16", "torch.float32", "--dtype"],
    ),
    "other dtype in one of q, k and v": (
        lambda folder: [
            with_tensor(name, lambda content, name=name: content[name].bfloat16())(folder)  # type: ignore[misc]
            for name in (f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1))
        ],
        ["k_proj", "torch.bfloat16", "--dtype"],
    ),
    "broken tokenizer": (text("tokenizer.json", "{"), ["tokenizer"]),
    "weights that are whole numbers": (
        lambda folder: rewrite(
            folder, {name: torch.ones(t.shape, dtype=torch.int8) for name, t in tensors(folder).items()}
        ),
        ["int8"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_converted(hf: Path, tmp_path: Path, refused: Refused, case: str) -> None:
    destroy, parts = BAD_FOLDERS[case]
    destroy(hf)
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", parts=[str(hf), *parts])


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path, refused: Refused) -> None:
    hf = write_model(tmp_path / "hf", vocab_size=60)
    refused(
        "hf-to-megatron",
        "--hf",
        hf,
        "--out",
        tmp_path / "out",
        parts=[str(hf), "tokenizer", "the last of config.json's vocabulary is 59"],
    )


def test_a_tied_model_with_a_head_of_its_own(tmp_path: Path, tool: Tool, refused: Refused) -> None:
    hf = write_model(tmp_path / "hf", tie_word_embeddings=True)
    embedding = tensors(hf)["model.embed_tokens.weight"]
    with_tensor("lm_head.weight", lambda _: embedding + torch.eye(*embedding.shape) * 1e-7)(hf)
    parts = ["lm_head.weight", "differs", "model.embed_tokens.weight", "tie_word_embeddings"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", parts=parts)
    with_tensor("lm_head.weight", lambda _: embedding.bfloat16())(hf)
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", parts=["lm_head.weight"])
    with_tensor("lm_head.weight", lambda _: embedding.clone())(hf)
    assert tool("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out").code == 0


def test_one_dtype_for_all_is_a_way_out_of_several(hf: Path, tmp_path: Path, tool: Tool) -> None:
    content = tensors(hf)
    rewrite(hf, content | {UP: content[UP].bfloat16()})
    assert tool("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", "--dtype", "bf16").code == 0


# Places


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("out", ["hf", "hf/out", "hf/../hf", "."])
def test_an_output_over_the_input(
    hf: Path, tmp_path: Path, refused: Refused, out: str, dry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("hf-to-megatron", "--hf", hf, "--out", out, "--force", *dry, parts=[str(hf), "overlap"])


@pytest.mark.parametrize("out", ["megatron", "megatron/hf", "link/out"])
def test_an_output_over_the_checkpoint(megatron: Path, tmp_path: Path, refused: Refused, out: str) -> None:
    (tmp_path / "link").symlink_to(megatron)
    arguments = ["--megatron", megatron, "--out", tmp_path / out, "--force"]
    refused("megatron-to-hf", *arguments, parts=[str(megatron), "overlap"])


def test_an_output_that_exists(hf: Path, megatron: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    parts = [str(tmp_path / "out"), "exists", "--force"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", parts=parts)
    refused("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out", parts=parts)


def test_an_output_that_is_a_file(hf: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").write_text("mine")
    for force in ([], ["--force"]):
        refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", *force, parts=[str(tmp_path / "out")])


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out"])
def test_an_output_below_a_file(hf: Path, megatron: Path, tmp_path: Path, refused: Refused, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    parts = [str(tmp_path / place), "is not written"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / place, parts=parts)
    refused("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / place, parts=parts)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_an_output_in_a_folder_that_is_read_only(hf: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    parts = ["is not written", "Permission denied"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "closed" / "out", parts=parts)


def test_a_disk_that_is_too_small(
    hf: Path, megatron: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1, 1))
    parts = [str(tmp_path / "out"), "GB", "free some"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", parts=parts)
    refused("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out", parts=parts)


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
@pytest.mark.parametrize("limit", [20_000, 100_000, 200_000])
def test_a_file_that_cannot_be_written_to_its_end(
    hf: Path, megatron: Path, tmp_path: Path, tool: Tool, command: str, limit: int
) -> None:
    source = ["--hf", hf] if command == "hf-to-megatron" else ["--megatron", megatron]
    before = snapshot(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a limit on the size of files: what a full disk or a quota does, in the middle of a write
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        done = tool(command, *source, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    says(last_line(done), [str(tmp_path / "out"), "is not written", "File too large"])
    assert snapshot(tmp_path) == before


# Options


@pytest.mark.parametrize("name", ["fp64", "int8", "BF16 ", ""])
def test_an_unknown_dtype(hf: Path, megatron: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    parts = ["--dtype", name, "fp32", "bf16"]
    refused("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", "--dtype", name, parts=parts)
    refused("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out", "--dtype", name, parts=parts)


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-1GB", "0", "0.0MB", "1e9", "5GBB", "nan", "5,000"])
def test_a_bad_shard_size(megatron: Path, tmp_path: Path, refused: Refused, size: str) -> None:
    arguments = ["--megatron", megatron, "--out", tmp_path / "out", f"--max-shard-size={size}"]
    refused("megatron-to-hf", *arguments, parts=["--max-shard-size", size])


@pytest.mark.parametrize(("weights", "part"), [("ema", "averaged teacher"), ("teacher", "model, ema or adapters")])
def test_weights_that_are_not_there(megatron: Path, tmp_path: Path, refused: Refused, weights: str, part: str) -> None:
    arguments = ["--megatron", megatron, "--out", tmp_path / "out", "--weights", weights]
    refused("megatron-to-hf", *arguments, parts=[part])


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf", "verify"])
def test_a_folder_that_is_not_there(tmp_path: Path, hf: Path, refused: Refused, command: str) -> None:
    nowhere = tmp_path / "nowhere"
    arguments = {
        "hf-to-megatron": ["--hf", nowhere, "--out", tmp_path / "out"],
        "megatron-to-hf": ["--megatron", nowhere, "--out", tmp_path / "out"],
        "verify": ["--hf", hf, "--megatron", nowhere],
    }[command]
    refused(command, *arguments, parts=[str(nowhere)])


# Megatron checkpoints


def metadata(change: Callable[[Any], object]) -> Break:
    """Change the unpickled `.metadata`, and leave no checksum that tells."""

    def write(folder: Path) -> None:
        content = pickle.loads((folder / ".metadata").read_bytes())
        change(content)
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        (folder / SUMS).unlink()

    return write


def somewhere_else(name: str) -> Break:
    def change(content: Any) -> None:
        index = next(iter(content.storage_data))
        place = content.storage_data[index]
        content.storage_data[index] = _StorageInfo(name, place.offset, place.length)

    return metadata(change)


def drop_chunk(content: Any) -> None:
    content.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()


def halve_chunk(content: Any) -> None:
    [chunk] = (chunks := content.state_dict_metadata["decoder.final_layernorm.weight"].chunks)
    chunks[0] = ChunkStorageMetadata(chunk.offsets, torch.Size([chunk.sizes[0] // 2]))


def drop_place(content: Any) -> None:
    for index in [index for index in content.storage_data if index.fqn == "decoder.final_layernorm.weight"]:
        del content.storage_data[index]


def drop_tensor(content: Any) -> None:
    del content.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]


def without_sums(change: Break) -> Break:
    return lambda folder: ((folder / SUMS).unlink(), change(folder))


BAD_CHECKPOINTS: dict[str, tuple[Break, list[str]]] = {
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), ["not a Megatron distributed checkpoint"]),
    "no format": (lambda folder: (folder / "metadata.json").unlink(), ["not a Megatron distributed checkpoint"]),
    "other format": (text("metadata.json", '{"sharded_backend": "zarr"}'), ["zarr", "torch_dist"]),
    "broken format": (text("metadata.json", "{"), ["cannot be read"]),
    "format that is a list": (text("metadata.json", "[]"), ["cannot be read"]),
    "missing file": (lambda folder: (folder / "__0_0.distcp").unlink(), ["__0_0.distcp", "copy"]),
    "empty metadata": (lambda folder: cut(folder / ".metadata", 0), ["cannot be read"]),
    "metadata cut short": (lambda folder: cut(folder / ".metadata"), ["cannot be read"]),
    "metadata that is something else": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"state": 1})),
        ["cannot be read"],
    ),
    "metadata without tensors": (metadata(lambda content: content.state_dict_metadata.clear()), ["missing"]),
    "metadata without places": (metadata(lambda content: setattr(content, "storage_data", None)), ["cannot be read"]),
    "metadata that leads outside": (somewhere_else("../hf/model.safetensors"), ["../hf/model.safetensors", "outside"]),
    "metadata that leads to the root": (somewhere_else("/etc/passwd"), ["/etc/passwd", "outside"]),
    "metadata that leads upwards": (somewhere_else(".."), [".."]),
    "tensor without pieces": (metadata(drop_chunk), ["decoder.final_layernorm.weight", "not whole"]),
    "piece of half the rows": (metadata(halve_chunk), ["decoder.final_layernorm.weight", "not whole"]),
    "piece without a place": (metadata(drop_place), ["decoder.final_layernorm.weight"]),
    "missing tensor": (metadata(drop_tensor), ["decoder.layers.mlp.linear_fc2.weight", "missing"]),
    "configuration of other sizes": (
        lambda folder: configure(folder / "hf", intermediate_size=48),
        ["linear_fc1.weight", "[2, 100, 42]", "[2, 96, 42]"],
    ),
    "configuration of more layers": (
        lambda folder: configure(folder / "hf", num_hidden_layers=3, layer_types=None),
        ["[2, ", "[3, "],
    ),
    "configuration of a larger vocabulary": (
        lambda folder: configure(folder / "hf", vocab_size=131),
        ["embedding.word_embeddings.weight", "[130, 42]", "[131, 42]"],
    ),
    "configuration of a smaller vocabulary": (
        lambda folder: configure(folder / "hf", vocab_size=120),
        ["embedding.word_embeddings.weight", "130 rows", "a vocabulary of 120", "--like"],
    ),
    "configuration of a smaller family": (
        lambda folder: configure(folder / "hf", architectures=["LlamaForCausalLM"], model_type="llama"),
        ["layernorm.weight", "LlamaForCausalLM"],
    ),
    "configuration of a larger family": (
        lambda folder: configure(folder / "hf", architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        ["linear_qkv.bias", "missing"],
    ),
    "configuration that ties": (
        lambda folder: configure(folder / "hf", tie_word_embeddings=True),
        ["output_layer.weight"],
    ),
    "file cut short, unnoticed by checksums": (
        without_sums(lambda folder: cut(folder / "__0_0.distcp", 0.7)),
        ["__0_0.distcp", "damaged"],
    ),
    "file of zeros, unnoticed by checksums": (
        without_sums(
            lambda folder: (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size))
        ),
        ["__0_0.distcp", "damaged"],
    ),
    "broken checksums": (text(SUMS, "who knows\n"), [SUMS, "who knows"]),
    "checksums that lead outside": (text(SUMS, f"{'0' * 64}  ../hf/config.json\n"), [SUMS, "../hf"]),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_converted(megatron: Path, tmp_path: Path, tool: Tool, case: str) -> None:
    destroy, parts = BAD_CHECKPOINTS[case]
    destroy(megatron)
    if "checksums" not in case:  # a folder from elsewhere has none: what is wrong must show without them
        (megatron / SUMS).unlink(missing_ok=True)
    before = snapshot(tmp_path)
    says(last_line(tool("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out")), [str(megatron), *parts])
    assert snapshot(tmp_path) == before


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_called_damaged(megatron: Path) -> None:
    reader = CheckpointReader(megatron)
    shutil.rmtree(megatron)
    with pytest.raises(UserError, match=r"megatron' was removed while it was read: .*checkpoint\.keep"):
        reader.read("decoder.final_layernorm.weight", ())


@pytest.mark.parametrize("command", ["megatron-to-hf", "verify"])
def test_a_folder_that_is_not_a_checkpoint(hf: Path, tmp_path: Path, refused: Refused, command: str) -> None:
    other = ["--out", tmp_path / "out"] if command == "megatron-to-hf" else ["--hf", hf]
    refused(command, "--megatron", hf, *other, parts=[str(hf), "not a Megatron distributed checkpoint"])


def test_an_output_over_the_configuration_s_folder_is_refused(hf: Path, megatron: Path, refused: Refused) -> None:
    arguments = ["--megatron", megatron, "--like", hf, "--out", hf, "--force"]
    refused("megatron-to-hf", *arguments, parts=[str(hf), "overlap"])


def test_no_empty_folders_are_left(hf: Path, tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_to_megatron, "folder_pieces", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    says(last_line(tool("hf-to-megatron", "--hf", hf, "--out", tmp_path / "a" / "b" / "out")), ["disk is gone"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("command", ["megatron-to-hf", "verify"])
def test_a_pickle_with_a_program_in_it_is_not_run(
    hf: Path, megatron: Path, tmp_path: Path, refused: Refused, command: str
) -> None:
    marker = tmp_path / "ran"
    (megatron / ".metadata").write_bytes(pickle.dumps(Malicious(marker)))
    (megatron / SUMS).unlink()
    other = ["--out", tmp_path / "out"] if command == "megatron-to-hf" else ["--hf", hf, "--logits"]
    refused(command, "--megatron", megatron, *other, parts=[str(megatron), "system", "no checkpoint needs"])
    assert not marker.exists()
    pickle.loads((megatron / ".metadata").read_bytes())
    assert marker.exists(), "it would have"


def test_a_state_with_a_program_in_it_is_not_run(hf: Path, megatron: Path, tmp_path: Path, refused: Refused) -> None:
    """megatron-core unpickles the states of layers whatever they are."""
    marker = tmp_path / "ran"
    content = pickle.loads((megatron / ".metadata").read_bytes())
    state = next(index for index in content.storage_data if "_extra_state" in index.fqn)
    torch.save([Malicious(marker)], megatron / "__1_0.distcp")
    content.storage_data[state] = _StorageInfo("__1_0.distcp", 0, (megatron / "__1_0.distcp").stat().st_size)
    (megatron / ".metadata").write_bytes(pickle.dumps(content))
    (megatron / SUMS).unlink()
    refused("verify", "--hf", hf, "--megatron", megatron, "--logits", parts=["__1_0.distcp", state.fqn])
    assert not marker.exists()


def test_a_tensor_with_a_program_in_it_is_not_run(megatron: Path, tmp_path: Path, tool: Tool) -> None:
    marker = tmp_path / "ran"
    content = pickle.loads((megatron / ".metadata").read_bytes())
    (place,) = [value for index, value in content.storage_data.items() if index.fqn == "decoder.final_layernorm.weight"]
    torch.save(Malicious(marker), tmp_path / "malicious")
    content.storage_data = {
        index: _StorageInfo("__1_0.distcp", 0, (tmp_path / "malicious").stat().st_size) if value is place else value
        for index, value in content.storage_data.items()
    }
    (tmp_path / "malicious").rename(megatron / "__1_0.distcp")
    (megatron / ".metadata").write_bytes(pickle.dumps(content))
    (megatron / SUMS).unlink()
    says(
        last_line(tool("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out")),
        ["__1_0.distcp", "damaged"],
    )
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_configuration_asks_for_a_folder_with_one(
    hf: Path, megatron: Path, tmp_path: Path, tool: Tool, refused: Refused
) -> None:
    shutil.rmtree(megatron / "hf")
    (megatron / SUMS).unlink()
    arguments = ["megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "out"]
    refused(*arguments, parts=[str(megatron), "hf/config.json", "--like"])
    refused("verify", "--hf", hf, "--megatron", megatron, parts=["--like"])
    (tmp_path / "empty").mkdir()
    refused(*arguments, "--like", tmp_path / "empty", parts=[str(tmp_path / "empty"), "config.json"])
    assert tool(*arguments, "--like", hf).code == 0
    assert_same_model(hf, tmp_path / "out")
    assert tool("verify", "--hf", hf, "--megatron", megatron, "--like", hf).code == 0


@pytest.mark.parametrize(("rows", "explained"), [(384, True), (512, True), (768, True), (640, False), (1000, False)])
def test_rows_beyond_a_vocabulary_are_left_out_only_where_they_can_be_padding(
    tmp_path: Path, tool: Tool, refused: Refused, rows: int, explained: bool
) -> None:
    # 300 tokens are padded to 384 at TP 1 and 3, to 512 at TP2, to 768 at TP6
    saved, like = (write_bits(tmp_path / name, vocab_size=size) for name, size in (("hf", rows), ("like", 300)))
    hf_to_megatron.convert(saved, tmp_path / "megatron")
    given = ["--megatron", tmp_path / "megatron", "--like", like]
    if explained:
        assert tool("megatron-to-hf", *given, "--out", tmp_path / "out").code == 0
        assert tensors(tmp_path / "out")["lm_head.weight"].shape[0] == 300
        return
    parts = [f"{rows} rows", "a vocabulary of 300", "--like", f"vocab_size to {rows}"]
    refused("megatron-to-hf", *given, "--out", tmp_path / "out", parts=parts)
    refused("verify", "--hf", like, *given, parts=parts)


# Two names of one program


def test_both_names_of_a_command_do_the_same(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: Tool
) -> None:
    for name, module in {"hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf}.items():
        source, target = (hf, "m") if module is hf_to_megatron else (tmp_path / "m-long", "h")
        option = "--hf" if module is hf_to_megatron else "--megatron"
        assert tool(name, option, source, "--out", tmp_path / f"{target}-long").code == 0
        monkeypatch.setattr(sys, "argv", [name, option, str(source), "--out", str(tmp_path / f"{target}-short")])
        with pytest.raises(SystemExit) as stopped:
            common.run(module.command, f"checkpoint_tools.{module.__name__}")
        assert not stopped.value.code
        assert snapshot(tmp_path / f"{target}-long") == snapshot(tmp_path / f"{target}-short")


def test_a_real_process_says_it_in_one_line(hf: Path, tmp_path: Path) -> None:
    without(UP)(hf)
    before = snapshot(tmp_path)
    says(process("-m", "checkpoint_tools.hf_to_megatron", "--hf", hf, "--out", tmp_path / "out"), [UP, "missing"])
    assert snapshot(tmp_path) == before
