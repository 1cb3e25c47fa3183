"""Checkpoints and megatron-core itself: what it loads at any layout, what it saves there, and what it computes."""

from __future__ import annotations

import json
import pickle
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd.models.architecture import read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.megatron_folder import load_model
from megatron_trd.models.weights import shard, slots
from tests.checkpoint_tools.folders import assert_same_model, configure, tensors, write_bits
from tests.distributed import run_ranks
from tests.models import write_model
from tests.weights.bits import same_bits

# Longer than what the model was first trained on: the frequencies of low and middle pitch are stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    # 300 tokens: padded to 384 on one tensor-parallel rank, to 512 on two
    "qwen3": {"vocab_size": 300, "num_hidden_layers": 4},
    "qwen2 tied": {"family": "qwen2", "vocab_size": 300, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "llama": {"family": "llama", "vocab_size": 300, "num_hidden_layers": 2, "rope_parameters": LLAMA3},
}
# (TP, PP, EP) one after the other on four ranks; those that are left over are data-parallel.
LAYOUTS = [(2, 2, 1), (1, 2, 1), (2, 1, 1)]
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3 moe": {"family": "qwen3_moe", "vocab_size": 300, "num_hidden_layers": 4},
    "qwen3 moe tied": {"family": "qwen3_moe", "num_hidden_layers": 2, "tie_word_embeddings": True, "num_experts": 8},
}
EXPERT_LAYOUTS = [(2, 2, 2), (1, 2, 1), (2, 1, 4), (1, 1, 2)]


def load_and_save(
    rank: int, world: int, folder: str, names: list[str], layouts: list[tuple[int, int, int]]
) -> list[str]:
    """Rank function: at each layout, each model's converted checkpoint loaded, then the one that was saved at the
    layout before, and that saved again. Returns what was not as it should be."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_trd import platform
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    filesystem_async._results_queue = queue.Queue()  # as in training/checkpoint.py
    wrong = []
    for place, (tp, pp, ep) in enumerate(layouts):
        grid = student_grid(tp, pp, ep, seed=0)
        for name in names:
            root = Path(folder, name)
            arch = read_architecture(ModelFolder(root / "hf"))
            with platform.current().megatron():
                model: Any = build_model(arch, grid, transformer_config(arch, grid), with_head=True)
            for source in ["megatron", *(saved(*layout) for layout in layouts[place - 1 : place])]:
                with torch.no_grad(), platform.current().megatron():
                    for parameter in model.parameters():
                        parameter.fill_(7.0)
                    load_model(root / source, model)
                where = f"{source} of {name} at TP{tp} PP{pp} EP{ep} on rank {rank}"
                wrong += [f"{where}: {what}" for what in _differences(model, grid, root / "hf")]
            target = root / saved(tp, pp, ep)
            if rank == 0:
                target.mkdir()
            dist.barrier()
            with platform.current().megatron():
                state = {"model": model.sharded_state_dict()}
                dist_checkpointing.save(state, str(target), sharded_strategy=("torch_dist", 1))
            if rank == 0:
                shutil.copytree(root / "megatron" / "hf", target / "hf")
        parallel_state.destroy_model_parallel()
    return wrong


def saved(tp: int, pp: int, ep: int) -> str:
    """Name of the checkpoint that megatron-core saved at a layout."""
    return f"saved at TP{tp} PP{pp} EP{ep}"


def _differences(model: Any, grid: Any, hf: Path) -> list[str]:
    """Parameters of this rank that are not the shards of the folder's tensors, to the last bit."""
    from megatron_trd.models import loading

    arch = read_architecture(ModelFolder(hf))
    full = tensors(hf)
    named = loading.local_parameters(model, arch, grid)
    wrong, seen = [], set()
    for slot in slots(arch):
        parameter = loading.find(slot, named)
        if parameter is None:
            continue
        place = grid.tensor_rank(expert=slot.expert is not None)
        expected = shard(slot, [full[name] for name in slot.hf], arch, *place)
        if not same_bits(parameter.detach(), expected):  # of a vocabulary with its padding, which is zero
            wrong.append(f"{slot.megatron[0]} {_what_differs(parameter.detach(), expected, slot.whole[0])}")
        seen.add(id(parameter))
    return wrong + [f"{name} is in no table" for name, parameter in named.items() if id(parameter) not in seen]


def _what_differs(found: Tensor, expected: Tensor, rows: int) -> str:
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, not {list(expected.shape)}"
    different = [row for row in range(len(found)) if not same_bits(found[row], expected[row])]
    return f"differs in {len(different)} of {len(found)} rows, first {different[0]}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model's folder `NAME/hf` and its checkpoint `NAME/megatron`."""
    root = tmp_path_factory.mktemp("layouts")
    for name, fields in (MODELS | EXPERTS).items():
        write_bits(root / name / "hf", **fields)
        hf_to_megatron.convert(root / name / "hf", root / name / "megatron")
    return root


@pytest.mark.parametrize(("models", "layouts"), [(MODELS, LAYOUTS), (EXPERTS, EXPERT_LAYOUTS)])
def test_megatron_loads_and_saves_a_checkpoint_at_any_layout(
    converted: Path, models: dict[str, Any], layouts: list[tuple[int, int, int]]
) -> None:
    assert run_ranks(load_and_save, 4, str(converted), list(models), layouts) == [[]] * 4
    for name in models:
        for layout in layouts:
            source, target = converted / name / saved(*layout), converted / name / f"hf {saved(*layout)}"
            megatron_to_hf.convert(source, target)
            assert_same_model(converted / name / "hf", target)
    if models is EXPERTS:
        return

    # A tensor that is cut was in pieces of the layout's number: the reader had to put them together.
    metadata = pickle.loads((converted / "qwen3" / saved(2, 2, 1) / ".metadata").read_bytes())
    pieces = {key: len(getattr(value, "chunks", [])) for key, value in metadata.state_dict_metadata.items()}
    assert pieces["embedding.word_embeddings.weight"] == 2
    assert pieces["decoder.layers.mlp.linear_fc2.weight"] == 4 * 2, "layers, ranks"


# Logits

LOGITS = """
import json, sys
from pathlib import Path
from megatron.core import parallel_state
from checkpoint_tools.verify import verify

for root in sys.argv[1:]:
    same = verify(Path(root, "hf"), Path(root, "megatron"), logits=True)
    print("RESULT", json.dumps([root, same]))
    parallel_state.destroy_model_parallel()
"""
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "num_hidden_layers": 2}


def far_from_position_independent(**fields: Any) -> dict[str, Any]:
    """Fields of a model whose attention looks at some places more than at others."""
    return SIZES | {"initializer_range": 0.1} | fields


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    roots = {
        "qwen2": far_from_position_independent(family="qwen2"),
        "qwen2 tied": far_from_position_independent(family="qwen2", tie_word_embeddings=True),
        "llama": far_from_position_independent(family="llama", rope_parameters=LLAMA3),
        "qwen3 yarn": far_from_position_independent(family="qwen3", rope_parameters=YARN),
        "qwen3 moe": far_from_position_independent(family="qwen3_moe"),
        "qwen3 moe unnormalised": far_from_position_independent(family="qwen3_moe", norm_topk_prob=False),
    }
    for name, fields in roots.items():
        write_model(tmp_path / name / "hf", **fields)
        hf_to_megatron.convert(tmp_path / name / "hf", tmp_path / name / "megatron")
    # the same, but that Megatron's side is told of no scaling, or of a bias that is lost
    shutil.copytree(tmp_path / "llama", tmp_path / "unscaled")
    configure(
        tmp_path / "unscaled" / "megatron" / "hf", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    )
    for file in (tmp_path / "unscaled" / "megatron").glob("*SUMS"):
        file.unlink()

    command = [sys.executable, "-c", LOGITS, *(str(tmp_path / name) for name in (*roots, "unscaled"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = dict(json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT"))
    assert results == {str(tmp_path / name): name != "unscaled" for name in (*roots, "unscaled")}, done.stdout
    verdicts = [line for line in lines if line.startswith(("SAME", "DIFFERENT"))]
    assert len(verdicts) == len(roots) + 1
    for verdict in verdicts:
        assert "float32, 1e-04 allowed" in verdict
    assert all(float(verdict.split("at most ")[1].split()[0]) < 1e-4 for verdict in verdicts[:-1])
    assert float(verdicts[-1].split("at most ")[1].split()[0]) > 0.01


@pytest.mark.parametrize("change", ["scaling", "bias"])
def test_the_logits_would_tell(tmp_path: Path, change: str) -> None:
    from transformers import AutoModelForCausalLM

    family, rope = ("llama", {"rope_parameters": LLAMA3}) if change == "scaling" else ("qwen2", {})
    path = write_model(tmp_path, **far_from_position_independent(family=family, **rope))
    ids = torch.randint(2, 98, (1, 3 * LLAMA3["original_max_position_embeddings"]))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        before = model(ids).logits
        if change == "scaling":
            configure(path, rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]})
            model = AutoModelForCausalLM.from_pretrained(path)
        else:
            for name, parameter in model.named_parameters():
                if name.endswith(("k_proj.bias", "q_proj.bias")):
                    parameter.zero_()
        assert before.std() > 0.3
        assert (model(ids).logits - before).abs().max() > 0.01
