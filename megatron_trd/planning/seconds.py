"""Time of a step by phase and part, without grading, logs and checkpoints, which do not depend on layouts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config import TrainConfig
from megatron_trd.methods import swaps_weights
from megatron_trd.models.architecture import Architecture
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning import memory, sizes
from megatron_trd.planning.case import Case
from megatron_trd.planning.workload import longest_of
from megatron_trd.reporting.progress import PHASES

Parts = dict[str, float]  # seconds by part

# A refit writes and reads in float32 the product of each adapter, and its sum with the weight.
_MERGED_BYTES = 2 * 4 + 2 * 4
# A gradient is read and reset; master weights and two moments in float32 are read and written; the weight is written.
_OPTIMIZER_BYTES = 4 + 4 + 2 * 12 + 2


def by_phase(case: Case) -> dict[str, Parts]:
    """Phase -> parts, in seconds per step."""
    epochs = case.config.epochs_per_batch
    teacher = _times(1 if case.config.frozen_teacher else epochs, _teacher(case))
    return dict(zip(PHASES, (_refit(case), _sample(case), teacher, _times(epochs, _train(case))), strict=True))


def _times(count: int, parts: Parts) -> Parts:
    return {name: count * seconds for name, seconds in parts.items()}


def _refit(case: Case) -> Parts:
    """The student's weights, and the teacher's if they are a moving average or share the engine; an engine of its own
    receives a frozen teacher's weights only once."""
    sources = [(case.student, case.student_layout)]
    if swaps_weights(case.config) or (len(case.engines) > 1 and case.config.averaged_teacher):
        sources.append((case.teacher, case.teacher_layout))
    parts: Parts = {"exchange": 0.0, "loading": 0.0}
    for arch, layout in sources:
        exchange, loading = _gathered(case, arch, layout)
        parts["exchange"] += exchange
        parts["loading"] += loading
    if case.config.lora.rank:
        parts["merging adapters"] = _merging(case)
    return parts


def _merging(case: Case) -> float:
    """Seconds in which each rank multiplies all adapters out and adds them to their weights."""
    device, efficiency = case.device, case.device.efficiency
    values = sum(slot.size for slot in sizes.adapted(case.student)) * case.student.layers
    products = 2 * case.config.lora.rank * values / (device.flops * efficiency.forward)
    return products + _MERGED_BYTES * values / (device.bandwidth * efficiency.copying)


def _gathered(case: Case, arch: Architecture, layout: Layout) -> tuple[float, float]:
    """Seconds to gather a whole model on every rank, and to read, assemble and write it into the engine."""
    efficiency = case.device.efficiency
    size = sizes.whole(arch).total * case.stack.weight_bytes
    ranks = memory.copy_ranks(layout)
    sent = size * (1 - 1 / ranks)
    stage = layout.tp * layout.dp
    link = case.cluster.link(stage, layout.pp) if layout.pp > 1 else case.cluster.link(1, ranks)
    tensors = sum(len(slot.hf) for slot in sizes.one_layer(arch)) * arch.layers
    copied = 3 * size / (case.device.bandwidth * efficiency.copying)
    return sent / link, copied + tensors * efficiency.tensor_seconds


@dataclass(frozen=True)
class _Requests:
    """Requests to an engine for each rollout."""

    count: int
    prompt: float  # tokens, mean
    response: float  # tokens, mean


def _sample(case: Case) -> Parts:
    """Sampling of rollouts and refinements. Two engines of a process take turns, and one that swaps weights does one
    after the other, so the times add up; one engine with one model does both together."""
    mean, longest = case.work.mean, case.work.longest
    rollout = _Requests(1, mean.prompt, mean.rollout)
    if not case.refines:
        return _engine(case, case.student, [rollout], longest.rollout)
    refinements = _Requests(case.work.refinements, mean.teacher_prompt, mean.response)
    if len(case.engines) == 1 and not swaps_weights(case.config):
        return _engine(case, case.student, [rollout, refinements], longest.rollout + longest.response)
    student = _engine(case, case.student, [rollout], longest.rollout)
    teacher = _engine(case, case.teacher, [refinements], longest.response)
    return {name: student[name] + teacher[name] for name in student}


def _engine(case: Case, arch: Architecture, requests: list[_Requests], longest: float) -> Parts:
    """Seconds of one engine for its share of the step's rollouts. For each, `requests` run one after another; their
    responses together have at most `longest` tokens."""
    tp, device, efficiency = case.config.sampler.tp, case.device, case.device.efficiency
    rollouts = -(-case.work.rollouts // (case.cluster.world // tp))
    chain = sum(each.response for each in requests)
    tokens = rollouts * sum(each.count * each.response for each in requests)
    running = min(rollouts * max(each.count for each in requests), _running(case, arch, requests))
    steps = max(longest_of(case.work.rollouts, chain, longest), tokens / running)
    read = _weights_read(arch, tokens / steps) * device.stack.weight_bytes / tp
    contexts = rollouts * sum(
        each.count * each.response * sizes.kv_bytes(arch, each.prompt + each.response / 2, tp, device.stack)
        for each in requests
    )
    products = 2 * (sizes.products_per_token(arch).total + sizes.head_shard(arch, 1)) * tokens / tp
    prompts = sum(each.count * sizes.forward_flops(arch, each.prompt, device.stack, tp=tp) for each in requests)
    peak, bandwidth = device.flops * efficiency.forward, device.bandwidth * efficiency.decoding
    collectives = 2 * arch.layers * efficiency.collective_seconds if tp > 1 else 0.0
    return {
        "prompts": rollouts * prompts / peak,
        "reading weights": max(steps * read / bandwidth, products / peak),
        "reading KV cache": contexts / bandwidth,
        "engine steps": steps * (efficiency.engine_seconds + collectives),
    }


def _running(case: Case, arch: Architecture, requests: list[_Requests]) -> int:
    """Concurrent requests of an engine: as many as fit, at their mean length, and are allowed."""
    tp, settings = case.config.sampler.tp, case.config.sampler
    one = max(sizes.kv_bytes(arch, each.prompt + each.response, tp, case.stack) for each in requests)
    running = min(settings.max_sequences, int(memory.kv_cache(case, arch) / one))
    if settings.max_running_tokens is not None:
        running = min(running, settings.max_running_tokens // case.work.context)
    return max(1, running)


def _weights_read(arch: Architecture, active: float) -> float:
    """Parameters that a step of `active` sequences reads: all but those of experts that receive no token."""
    parameters = sizes.whole(arch)
    embedding = 0 if arch.tied else sizes.head_shard(arch, 1)
    if not arch.experts:
        return parameters.total - embedding
    missed = (1 - arch.experts_per_token / arch.experts) ** active
    return parameters.shared - embedding + parameters.experts * (1 - missed)


def _teacher(case: Case) -> Parts:
    """Forward passes over whole sequences; hidden states are sent to the student's last stages."""
    config, layout, work = case.config, case.teacher_layout, case.work
    share = work.busiest_share(work.mean.teacher, work.longest.teacher, layout.dp)
    split, length = config.shared_teacher and config.student.sequence_parallel, work.mean.teacher
    flops = sizes.forward_flops(case.teacher, length, case.stack, tp=layout.tp, sequence_parallel=split)
    micro = config.teacher.micro_batch_size
    parts = _passes(case, case.teacher, layout, share, length, micro, flops=flops, passes=1, split=split)
    sent = work.of_replica(case.student_layout.dp) * work.mean.response * case.teacher.hidden_size
    sent *= case.stack.weight_bytes * config.student.tp  # each tensor-parallel rank of the stage gets them
    parts["hidden states"] = sent / case.cluster.link(1, case.cluster.world)
    return parts


def _train(case: Case) -> Parts:
    """Forward, backward, recomputation; the loss; gradients over replicas; the optimizer."""
    config, layout, work = case.config, case.student_layout, case.work
    device, efficiency = case.device, case.device.efficiency
    share = work.busiest_share(work.mean.student, work.longest.student, layout.dp)
    settings, passes = config.student, _train_passes(config)
    parts = _passes(
        case, case.student, layout, share, work.mean.student, settings.micro_batch_size,
        flops=_train_flops(case), passes=passes, split=settings.sequence_parallel,
    )  # fmt: skip
    # Logits of both sides, and the gradients of the student's hidden states and, without adapters, of its head.
    student = 4 if config.lora.rank else 6
    head = student * sizes.head_shard(case.student, layout.tp) + 2 * sizes.head_shard(case.teacher, layout.tp)
    tokens = share * work.mean.response
    parts["loss"] = tokens * head / (device.flops * efficiency.head)
    trained = memory.trained_values(case, 0)
    parts["gradients over replicas"] = _reduction(case, trained, layout, config)
    state = memory.optimizer_values(case, trained) * _OPTIMIZER_BYTES
    parts["optimizer"] = state / (device.bandwidth * efficiency.copying)
    if case.config.averaged_teacher:
        parts["teacher's average"] = sum(_gathered(case, case.student, layout))
        if config.lora.rank:
            parts["teacher's average"] += _merging(case)
    return parts


def _train_passes(config: TrainConfig) -> int:
    """Forward passes that take as long as training: backward counts as two, recomputation as one."""
    return 4 if config.student.recompute else 3


def _train_flops(case: Case) -> float:
    """FLOPs of all layers to train on one sequence, on each rank of a tensor-parallel group. With adapters, backward
    leaves out the gradients of the weights: one pass of the products with them, none of attention's."""
    config, tp, length = case.config, case.student_layout.tp, case.work.mean.student
    rank, passes, split = config.lora.rank, _train_passes(config), config.student.sequence_parallel
    forward = sizes.forward_flops(case.student, length, case.stack, tp=tp, sequence_parallel=split)
    if not rank:
        return passes * forward
    adapters = sizes.adapter_flops(case.student, length, rank, tp)
    return passes * (forward + adapters) - sizes.weight_flops(case.student, length, tp=tp, sequence_parallel=split)


def _passes(
    case: Case,
    arch: Architecture,
    layout: Layout,
    share: float,
    length: float,
    micro_batch: int,
    *,
    flops: float,
    passes: int,
    split: bool,
) -> Parts:
    """Seconds of `passes` forward passes for `share` sequences, of `flops` each in all, on each pipeline of a layout.

    Communication and the host's time are taken to be the same with adapters, whose many small products and sums replace
    those of the weights' gradients.
    """
    device, efficiency = case.device, case.device.efficiency
    reached = efficiency.forward if passes == 1 else efficiency.training
    batches = max(1.0, share / micro_batch)
    layers = arch.layers / layout.pp
    products = share * flops / layout.pp / (device.flops * reached)
    communication = passes * layers * share * _layer_communication(case, arch, layout, length, split=split)
    host = passes * batches * layers * efficiency.layer_seconds
    parts = {"layers": products + host, "communication": communication}
    if layout.pp > 1:  # the pipeline fills and drains
        parts["pipeline fill"] = (products + communication + host) * (layout.pp - 1) / batches
    return parts


def _layer_communication(case: Case, arch: Architecture, layout: Layout, length: float, *, split: bool) -> float:
    """Seconds of one sequence in one layer: two sums over TP (or a gather and a scatter), two exchanges over EP."""
    size = length * arch.hidden_size * case.stack.weight_bytes
    seconds = 0.0
    if layout.tp > 1:
        sums = 1 if arch.experts else 2
        seconds += sums * 2 * size * (layout.tp - 1) / layout.tp / case.cluster.link(1, layout.tp)
        seconds += sums * case.device.efficiency.collective_seconds
    if layout.ep > 1:
        sent = size * arch.experts_per_token / (layout.tp if split else 1)
        seconds += 2 * sent * (layout.ep - 1) / layout.ep / case.cluster.link(1, layout.ep)
        seconds += 2 * case.device.efficiency.collective_seconds
    return seconds


def _reduction(case: Case, trained: sizes.Parameters, layout: Layout, config: TrainConfig) -> float:
    """Scatter of gradients in float32 and gather of weights, or sum of whole gradients; nothing is overlapped."""
    weight = case.stack.weight_bytes if config.student.distributed_optimizer else 4
    experts = layout.tp * layout.dp // layout.ep
    seconds = 0.0
    for values, replicas, stride in ((trained.shared, layout.dp, layout.tp), (trained.experts, experts, layout.ep)):
        if replicas > 1:
            seconds += values * (4 + weight) * (replicas - 1) / replicas / case.cluster.link(stride, replicas)
    return seconds
