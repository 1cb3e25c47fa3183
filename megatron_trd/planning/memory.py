"""Memory of a rank by phase and part, and the reasons why a case does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_trd.engines.hidden_store import WAVE
from megatron_trd.losses.head import chunks, chunks_under_way, waiting_tokens
from megatron_trd.methods import METHODS, swaps_weights
from megatron_trd.models.architecture import Architecture
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning import sizes
from megatron_trd.planning.case import Case
from megatron_trd.planning.devices import Stack
from megatron_trd.reporting.progress import PHASES

GIB = 2**30

Parts = dict[str, float]  # bytes by what they are for

# Parts of an engine's memory; on a GPU they make up its `memory_fraction` while it samples.
_ENGINE = _WEIGHTS, _CACHE, _WORK, _GRAPHS = "engine weights", "KV cache", "engine activations", "engine graphs"

# Memory of the loss besides its chunks, for a matrix library and a few rows at a time: 15 to 49 MiB were measured
# (benchmarks/results/loss_cpu*.md).
_LOSS_SCRATCH = 40 * 2**20
_TOP_K_SCRATCH = 1100  # per token of a chunk and column kept: segments of columns and a copy (measured on a CPU)
_STEP = 0.05  # of a proposed memory fraction
_GRADIENT_BYTES = 4  # gradients are summed in float32


@dataclass(frozen=True)
class Shortfall:
    """One reason why a layout does not fit."""

    phase: str
    over: float  # bytes too many
    why: str


def by_phase(case: Case) -> dict[str, Parts]:
    """Phase -> parts of the fullest rank in it, among ranks with different stages of student and teacher."""
    ranks = [_of_rank(case, *place) for place in sorted(case.places)]
    return {phase: max((rank[phase] for rank in ranks), key=lambda parts: sum(parts.values())) for phase in PHASES}


def shortfalls(case: Case, memory: dict[str, Parts]) -> list[Shortfall]:
    """Why the case does not fit; empty if it does."""
    limit = case.device.memory
    found = []
    for phase, parts in memory.items():
        over = sum(parts.values()) - limit
        if over > 0:
            largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
            why = ", ".join(f"{name} {value / GIB:.1f}" for name, value in largest)
            found.append(Shortfall(phase, over, f"{why} GiB"))
    for arch in case.engines:
        need, has = sizes.kv_bytes(arch, case.work.context, case.config.sampler.tp, case.stack), kv_cache(case, arch)
        if has < need:
            why = (
                f"an engine has {max(0.0, has) / GIB:.1f} GiB for keys and values, one sequence of "
                f"{case.work.context:,} tokens takes {need / GIB:.1f}"
            )
            found.append(Shortfall("sample", need - has, why))
    return found


def largest_fraction(case: Case) -> float:
    """The largest `sampler.memory_fraction`, in steps of 0.05, that leaves room for the rest; 0 if there is none."""
    phases = ["sample"] if case.sleeps else PHASES
    found = by_phase(case)
    others = max(sum(value for part, value in found[phase].items() if part not in _ENGINE) for phase in phases)
    free = (case.device.memory - others) / len(case.engines) / case.device.memory
    return max(0.0, round(math.floor(min(free, 0.9) / _STEP + 1e-9) * _STEP, 2))


def useful_fraction(case: Case) -> float:
    """The `sampler.memory_fraction` with which no request waits, however long all are; steps of 0.05, at most 0.9."""
    engines = case.cluster.world // case.config.sampler.tp
    requests = -(-case.work.rollouts // engines) * max(1, case.work.refinements)
    requests = min(requests, case.config.sampler.max_sequences)
    needs = [
        _engine_taken(case, arch)
        + requests * sizes.kv_bytes(arch, case.work.context, case.config.sampler.tp, case.stack)
        for arch in case.engines
    ]
    return min(0.9, round(math.ceil(max(needs) / case.device.memory / _STEP) * _STEP, 2))


def kv_cache(case: Case, arch: Architecture) -> float:
    """Bytes that an engine has for keys and values on a rank; negative if not even the weights fit."""
    settings, device = case.config.sampler, case.device
    if not device.stack.engine_shares:
        return settings.host_kv_cache_gib * GIB
    return settings.memory_fraction * device.memory - _engine_taken(case, arch)


def _of_rank(case: Case, student_stage: int, teacher_stage: int) -> dict[str, Parts]:
    resident = _resident(case, student_stage, teacher_stage)
    weights = sum(_engine_weights(case, arch) for arch in case.engines)
    cache = sum(max(0.0, kv_cache(case, arch)) for arch in case.engines)
    graphs = resident | {_GRAPHS: len(case.engines) * _graphs(case)}
    awake = {_WEIGHTS: weights, _CACHE: cache}
    work = {_WORK: sum(_engine_work(case, arch) for arch in case.engines)}
    student, teacher = case.config.student, case.config.teacher
    away = {"gradients": 0.0, "optimizer": 0.0} if student.offload else {}
    refitting = graphs | away | ({_WEIGHTS: weights} if case.sleeps else awake)
    buckets, swaps = {"refit buckets": _refit_buckets(case)}, swaps_weights(case.config)  # swapped during sampling
    sampling = graphs | away | ({"teacher weights": 0.0} if teacher.offload and not swaps else {}) | awake | work
    training = graphs | ({} if case.sleeps else awake) | (work if case.config.staleness else {})
    received = _received(case, student_stage)
    beside = _teacher_parts(case, teacher_stage, 0.0) if case.config.overlap == "teacher" else {}
    return {
        "refit": refitting | buckets | _merged(case),
        "sample": sampling | beside | (buckets if swaps else {}),
        "teacher": training | _teacher_parts(case, teacher_stage, received),
        "train": training | {"teacher's hidden states": received} | _train_parts(case, student_stage),
    }


def _resident(case: Case, student_stage: int, teacher_stage: int) -> Parts:
    """Memory in use in every phase."""
    stack, layout = case.stack, case.student_layout
    own = sizes.of_rank(case.student, layout, student_stage, with_head=True)
    adapters, trained = _adapters(case), trained_values(case, student_stage)
    return {
        "student weights": (own.total + adapters) * stack.weight_bytes,
        "gradients": trained.total * _GRADIENT_BYTES,
        "optimizer": optimizer_values(case, trained) * stack.optimizer_bytes,
        "teacher weights": _teacher_values(case, student_stage, teacher_stage) * _teacher_bytes(case),
        "process": case.device.efficiency.context_gib * GIB,
    }


def _adapters(case: Case) -> int:
    """Values of the student's adapters on a rank, the same on every stage."""
    layout = case.student_layout
    return sizes.adapters_of_layer(case.student, case.config.lora.rank, layout.tp) * (case.student.layers // layout.pp)


def trained_values(case: Case, stage: int) -> sizes.Parameters:
    """Parameters of a rank that have gradients and optimizer state: all, or the adapters alone where there are any."""
    if case.config.lora.rank:
        return sizes.Parameters(_adapters(case))
    return sizes.of_rank(case.student, case.student_layout, stage, with_head=True)


def optimizer_values(case: Case, trained: sizes.Parameters) -> float:
    """Parameters whose optimizer state a rank holds: its shard over the replicas of each, or all that are trained."""
    if not case.config.student.distributed_optimizer:
        return trained.total
    layout = case.student_layout
    return trained.shared / layout.dp + trained.experts * layout.ep / (layout.tp * layout.dp)


def _teacher_bytes(case: Case) -> int:
    """Bytes of a teacher's weight; averages are in float32, in addition to narrower weights."""
    narrow = case.stack.weight_bytes
    return narrow + 4 if case.config.averaged_teacher and narrow < 4 else narrow


def _teacher_values(case: Case, student_stage: int, teacher_stage: int) -> float:
    """Values of the teacher's body, and those of its head on the student's last stage."""
    if case.config.shared_teacher:
        return 0.0
    body = sizes.of_rank(case.teacher, case.teacher_layout, teacher_stage, with_head=False).total
    last = student_stage == case.student_layout.pp - 1
    return body + (sizes.head_shard(case.teacher, case.student_layout.tp) if last else 0)


def _train_parts(case: Case, stage: int) -> Parts:
    """Activations kept over a step's pipeline, and the loss on the last stage."""
    settings, layout, work = case.config.student, case.student_layout, case.work
    stack, hidden = case.stack, case.student.hidden_size
    sequences = work.of_replica(layout.dp)
    batch = min(settings.micro_batch_size, sequences)
    tokens = batch * work.longest.student
    in_flight = min(-(-sequences // batch), layout.pp - stage)
    split = layout.tp if settings.sequence_parallel else 1
    layer = sizes.kept_by_layer(
        case.student, layout, int(work.longest.student), stack,
        sequence_parallel=settings.sequence_parallel, adapter_rank=case.config.lora.rank,
    )  # fmt: skip
    kept = hidden / split * stack.weight_bytes if settings.recompute else layer
    layers = in_flight * case.student.layers // layout.pp * kept * tokens
    # Backward works on one layer: its gradients, and its kept values if they are recomputed.
    working = (2 if settings.recompute else 1) * layer * tokens
    loss = 0.0
    if stage == layout.pp - 1:
        # Final norm, gathered sequence and its gradient.
        layers += (2 * hidden / split + 2 * hidden) * stack.weight_bytes * tokens
        loss = _loss(case, int(batch * work.longest.response))
    return {"activations": layers + max(0.0, working - loss), "loss": loss}


def _loss(case: Case, tokens: int) -> float:
    """Chunks of logits, or the tensor returned to autograd for the head's gradient, which itself is in Megatron's
    buffer (with adapters the head has none); both sides' selected hidden states, and their gradient."""
    narrow, tp, settings = case.stack.weight_bytes, case.student_layout.tp, case.config
    hidden = tokens * ((4 + 2 * narrow) * case.student.hidden_size + narrow * case.teacher.hidden_size)
    width = case.student.padded_vocab(tp) // tp
    top_k = METHODS[settings.method].divergence.arguments(settings.loss)["top_k"]
    logits = loss_chunks(tokens, width, settings.loss.chunk_tokens, tp, case.stack, top_k or 0)
    gradient = 0 if settings.lora.rank else narrow * sizes.head_shard(case.student, tp)
    return max(logits, gradient) + hidden


def loss_chunks(tokens: int, width: int, chunk_tokens: int | None, tp: int, stack: Stack, top_k: int = 0) -> float:
    """Bytes of float32 logits in chunks, both sides of `tokens` tokens by `width` columns, and of their work space."""
    depth, device = chunks_under_way(tp), torch.device(stack.device)
    slices = chunks(tokens, width, chunk_tokens, torch.float32, device, under_way=depth)
    rows = slices[0].stop if slices else 0
    head = torch.float32 if stack.weight_bytes == 4 else torch.bfloat16
    waiting = waiting_tokens(tokens, rows, head, torch.float32, device, under_way=depth)
    scratch = _LOSS_SCRATCH + _TOP_K_SCRATCH * rows * top_k
    return width * (rows * 2 * min(depth, len(slices)) * 4 + waiting * stack.weight_bytes) + scratch


def _teacher_parts(case: Case, stage: int, received: float) -> Parts:
    """Activations of one layer; on the last stage also hidden states of a micro-batch and of responses made at once."""
    layout, work, stack, size = case.teacher_layout, case.work, case.stack, case.config.teacher.micro_batch_size
    sequences = work.of_replica(layout.dp)
    tokens = min(size, sequences) * work.longest.teacher
    split = case.config.shared_teacher and case.config.student.sequence_parallel
    layer = sizes.kept_by_layer(case.teacher, layout, int(work.longest.teacher), stack, sequence_parallel=split)
    last = stage == layout.pp - 1
    made = (tokens + _at_once(case, sequences) * work.longest.response) * _hidden_bytes(case) if last else 0.0
    return {"activations": layer * tokens, "teacher's hidden states": made + received}


def _received(case: Case, student_stage: int) -> float:
    """The teacher's hidden states that are on the student's last stage at once, for a replica's responses."""
    if student_stage != case.student_layout.pp - 1:
        return 0.0
    sequences = _at_once(case, case.work.of_replica(case.student_layout.dp))
    return sequences * case.work.longest.response * _hidden_bytes(case)


def _at_once(case: Case, sequences: float) -> float:
    """Number of a replica's sequences whose hidden states are on the device at once."""
    settings = case.config.teacher
    return sequences if settings.hidden_in == "device" else min(WAVE * settings.micro_batch_size, sequences)


def _hidden_bytes(case: Case) -> int:
    return case.teacher.hidden_size * case.stack.weight_bytes


def _refit_buckets(case: Case) -> float:
    """Buckets during their exchange, and one assembled parameter; for experts, all of a layer."""
    sources = {(case.student, case.student_layout), (case.teacher, case.teacher_layout)}
    return max(_bucket(case, arch, layout) for arch, layout in sources if arch in case.engines)


def _bucket(case: Case, arch: Architecture, layout: Layout) -> float:
    stack = case.stack
    largest = max(slot.size for slot in sizes.one_layer(arch)) * stack.weight_bytes
    experts = sizes.whole(arch).experts // arch.layers * stack.weight_bytes  # those of a layer stay together
    if copy_ranks(layout) == 1 or stack.sees_peers:
        return experts
    limit = case.config.sampler.refit_bucket_bytes
    bucket = max(limit, largest, experts)
    bucket = min(bucket, sizes.whole(arch).total * stack.weight_bytes)
    return largest + bucket


def _merged(case: Case) -> Parts:
    """The largest parameter with adapters while they are merged into it: their product and the sum, in float32. That is
    in the student's refit; the teacher's, during sampling, has nothing to merge."""
    if not case.config.lora.rank:
        return {}
    return {"merged parameter": 2 * 4 * max(slot.size for slot in sizes.adapted(case.student))}


def copy_ranks(layout: Layout) -> int:
    """Number of ranks that together hold a whole model."""
    return len(layout.copies[0])


def _engine_taken(case: Case, arch: Architecture) -> float:
    """The part of an engine's share of the memory that is not for keys and values."""
    return _engine_weights(case, arch) + _engine_work(case, arch) + _graphs(case)


def _engine_weights(case: Case, arch: Architecture) -> float:
    stack = case.stack
    return sizes.engine_parameters(arch, case.config.sampler.tp) * stack.weight_bytes * stack.engine_copies


def _engine_work(case: Case, arch: Architecture) -> float:
    """Activations of the largest pass of an engine, and the logits of its sequences, twice in float32."""
    size, tp = arch.sizes(), case.config.sampler.tp
    wide = arch.experts_per_token * size["expert_ffn"] if arch.experts else size["ffn"]
    token = (3 * size["hidden"] + 3 * wide / tp) * case.stack.weight_bytes
    logits = case.config.sampler.max_sequences * arch.vocab_size * 8
    return case.device.efficiency.engine_tokens * token + logits


def _graphs(case: Case) -> float:
    return 0.0 if case.config.sampler.enforce_eager else case.device.efficiency.graphs_gib * GIB
