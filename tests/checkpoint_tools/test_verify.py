"""`verify` says SAME of what is the same to the last bit and names what is not; `--dry-run` says what would be done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_tools import hf_to_megatron
from tests.checkpoint_tools.commands import Tool, says
from tests.checkpoint_tools.folders import configure, rewrite, snapshot, tensors, write_bits
from tests.models import FAMILIES

Content = dict[str, Tensor]
LAYER = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf` of finite values and its checkpoint `megatron`."""
    root = tmp_path_factory.mktemp("whole")
    write_bits(root / "hf", num_hidden_layers=12)
    rewrite(root / "hf", {name: tensor.where(~tensor.isnan(), 1.0) for name, tensor in tensors(root / "hf").items()})
    hf_to_megatron.convert(root / "hf", root / "megatron")
    return root


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_checkpoint_are_the_same(tmp_path: Path, tool: Tool, family: str, tied: bool) -> None:
    hf = write_bits(tmp_path / "hf", family=family, tie_word_embeddings=tied)  # NaNs are themselves here
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    before = snapshot(tmp_path)
    done = tool("verify", "--hf", hf, "--megatron", tmp_path / "megatron")
    assert done.code == 0
    verdict = done.out.splitlines()[-1]
    assert verdict.startswith("SAME")
    assert f"{len(tensors(hf))} tensors" in verdict
    assert "model.layers.*.self_attn.q_proj.weight" in done.out
    assert snapshot(tmp_path) == before, "to look is not to touch"


def test_a_configuration_that_differs_is_another_model(whole: Path, hf: Path, tool: Tool) -> None:
    configure(hf, rms_norm_eps=1e-3)
    done = tool("verify", "--hf", hf, "--megatron", whole / "megatron")
    assert done.code == 1
    assert done.out.splitlines()[-1].startswith("DIFFERENT")
    assert "config.json differs in norm_eps" in done.out


def nudged(name: str) -> Callable[[Content], Content]:
    """The last value of a tensor, changed in its last bit."""

    def change(content: Content) -> Content:
        tensor = content[name].clone()
        tensor.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return {name: tensor}

    return change


CHANGES: dict[str, tuple[Callable[[Content], Content], list[str]]] = {
    "first layer": (nudged(LAYER.format(0)), [LAYER.format(0)]),
    "last layer": (nudged(LAYER.format(11)), [LAYER.format(11)]),
    "the last token": (nudged("model.embed_tokens.weight"), ["model.embed_tokens.weight"]),
    "head": (nudged("lm_head.weight"), ["lm_head.weight"]),
    "norm": (nudged("model.norm.weight"), ["model.norm.weight"]),
    "value": (
        nudged("model.layers.3.self_attn.v_proj.weight"),
        ["model.layers.3.self_attn.v_proj.weight"],
    ),
    "sign of zero": (
        lambda content: {"model.norm.weight": torch.cat([content["model.norm.weight"][:-1], torch.tensor([-0.0])])},
        ["model.norm.weight"],
    ),
    "two layers exchanged": (
        lambda content: {LAYER.format(1): content[LAYER.format(2)], LAYER.format(2): content[LAYER.format(1)]},
        [LAYER.format(1), LAYER.format(2)],
    ),
    "gate and up exchanged": (
        lambda content: {
            "model.layers.5.mlp.gate_proj.weight": content[LAYER.format(5)],
            LAYER.format(5): content["model.layers.5.mlp.gate_proj.weight"],
        },
        ["model.layers.5.mlp.gate_proj.weight", LAYER.format(5)],
    ),
    "two heads exchanged": (
        lambda content: {
            "model.layers.0.self_attn.q_proj.weight": content["model.layers.0.self_attn.q_proj.weight"].roll(24, 0)
        },
        ["model.layers.0.self_attn.q_proj.weight"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_differs_is_named(whole: Path, hf: Path, tool: Tool, case: str) -> None:
    change, names = CHANGES[case]
    content = tensors(hf)
    content["model.norm.weight"][-1] = 0.0
    rewrite(hf, content)
    hf_to_megatron.convert(hf, hf.parent / "megatron")
    rewrite(hf, content | change(content))
    done = tool("verify", "--hf", hf, "--megatron", hf.parent / "megatron")
    assert done.code == 1
    verdict = done.out.splitlines()[-1]
    assert verdict.startswith("DIFFERENT")
    assert sorted(re.findall(r"(?:model\.|lm_head)[\w.]*", verdict)) == sorted(names)
    assert f"{len(names)} tensors differ" in verdict
    assert not done.err.count("Traceback")


def test_many_differences_are_counted_and_some_are_named(whole: Path, hf: Path, tool: Tool) -> None:
    rewrite(hf, {name: tensor + 1 for name, tensor in tensors(hf).items() if tensor.dim()})
    done = tool("verify", "--hf", hf, "--megatron", whole / "megatron")
    assert done.code == 1
    verdict = done.out.splitlines()[-1]
    count = re.search(r"(\d+) tensors differ", verdict)
    assert count
    assert int(count[1]) > 100
    assert len(verdict) < 1000


def test_a_cast_is_said_and_compared_as_cast(whole: Path, hf: Path, tmp_path: Path, tool: Tool) -> None:
    hf_to_megatron.convert(hf, tmp_path / "narrow", dtype=torch.bfloat16)
    done = tool("verify", "--hf", hf, "--megatron", tmp_path / "narrow")
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith("SAME")
    assert "float32 as bfloat16" in " ".join(done.out.split())
    plain = tool("verify", "--hf", hf, "--megatron", whole / "megatron")
    assert plain.code == 0
    assert " as " not in plain.out
    content = tensors(hf)
    changed = content["model.norm.weight"].clone()
    changed[0] = 77.0
    rewrite(hf, content | {"model.norm.weight": changed})
    assert tool("verify", "--hf", hf, "--megatron", tmp_path / "narrow").code == 1


def test_models_of_two_shapes_are_not_compared(whole: Path, tmp_path: Path, tool: Tool) -> None:
    other = write_bits(tmp_path / "other", num_hidden_layers=12, intermediate_size=48)
    says(tool("verify", "--hf", other, "--megatron", whole / "megatron"), [str(other), "mlp.", "[48, 42]", "[50, 42]"])
    fewer = write_bits(tmp_path / "fewer", num_hidden_layers=2)
    says(tool("verify", "--hf", fewer, "--megatron", whole / "megatron"), ["model.layers.2.", "missing"])
    more = write_bits(tmp_path / "more", num_hidden_layers=13)
    says(tool("verify", "--hf", more, "--megatron", whole / "megatron"), ["model.layers.12."])


# Dry runs


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_dry_run_prints_the_mapping_and_writes_nothing(
    tmp_path: Path, tool: Tool, command: str, dtype: str | None
) -> None:
    hf = write_bits(tmp_path / "hf", family="qwen3_moe")
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    source = ["--hf", hf] if command == "hf-to-megatron" else ["--megatron", tmp_path / "megatron"]
    cast = [] if dtype is None else ["--dtype", dtype]
    before = snapshot(tmp_path)
    done = tool(command, *source, "--out", tmp_path / "deep" / "out", *cast, "--dry-run")
    assert done.code == 0
    assert not done.err
    assert snapshot(tmp_path) == before

    printed = re.sub(r"\s+", " ", done.out)
    for name, shapes in {
        "model.embed_tokens.weight": ["[1003, 42]"],
        "model.layers.*.self_attn.q_proj.weight": ["[144, 42]", "[3, 240, 42]"],
        "model.layers.*.mlp.experts.*.down_proj.weight": ["[42, 32]", "[3, 4, 42, 32]"],
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": ["[3, 4, 64, 42]"],
        "decoder.layers.mlp.router.weight": ["[4, 42]", "[3, 4, 42]"],
        "output_layer.weight": ["[1003, 42]"],
    }.items():
        assert name in printed
        assert all(shape in printed for shape in shapes), name
    stored = tensors(hf)
    size = sum(tensor.numel() for tensor in stored.values()) * (4 if dtype is None else 2)
    assert f"{len(stored)} tensors, {size / 1000:.1f} kB" in printed
    assert ("bfloat16" in printed) == (dtype is not None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dry_run_counts_a_tied_head_once(tmp_path: Path, tool: Tool, tied: bool) -> None:
    hf = write_bits(tmp_path / "hf", tie_word_embeddings=tied)
    done = tool("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", "--dry-run")
    assert f"{len(tensors(hf))} tensors" in done.out
    assert ("output_layer.weight" in done.out) != tied


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path: Path, tool: Tool) -> None:
    hf = write_bits(tmp_path / "hf")
    configure(hf, vocab_size=1004)
    says(tool("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", "--dry-run"), ["[1003, 42]", "[1004, 42]"])
