"""The student: a Megatron model under DDP and Megatron's optimizer, trained by the divergence on its last stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.batching import MicroBatch, Sample
from megatron_trd.engines.offload import Offload
from megatron_trd.engines.schedule import batches_of, run_schedule
from megatron_trd.errors import UserError
from megatron_trd.losses import FusedDivergence, fused_linear_divergence, vocab_parallel_log_prob
from megatron_trd.methods import METHODS
from megatron_trd.models import loading, lora
from megatron_trd.models.architecture import build_model, transformer_config
from megatron_trd.models.gathering import SpreadWeights
from megatron_trd.models.model import Model
from megatron_trd.parallel.grid import Grid


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, equal on every rank."""

    loss: float  # weighted sum of the divergence over all response tokens
    divergence: float  # mean over response tokens
    grad_norm: float  # before clipping
    lr: float  # learning rate of this step
    drift_mean: float  # mean and largest |log p| difference between sampler and trainer, nats
    drift_max: float


class _Sums:
    """Sums that the last stages accumulate over a step's micro-batches."""

    def __init__(self, device: torch.device) -> None:
        self.batches = 0
        # loss, divergence, tokens, drift, tokens with drift
        self.totals = torch.zeros(5, dtype=torch.float64, device=device)
        self.largest = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, fused: FusedDivergence, drift: Tensor | None, *, counted: bool) -> None:
        """Add a micro-batch; tensor-parallel ranks hold the same numbers, so only one of them is `counted`."""
        self.batches += 1
        if not counted:
            return
        self.totals[0] += fused.loss.detach()
        self.totals[1] += fused.per_token.sum(dtype=torch.float64)
        self.totals[2] += len(fused.per_token)
        if drift is not None and len(drift):
            self.totals[3] += drift.sum(dtype=torch.float64)
            self.totals[4] += len(drift)
            self.largest[0] = drift.max()

    def result(self, *, grad_norm: float, lr: float) -> StepResult:
        """Totals over all ranks. Collective."""
        dist.all_reduce(self.totals)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
        loss, divergence, tokens, drift, drift_tokens = self.totals.tolist()
        return StepResult(
            loss=loss,
            divergence=divergence / max(tokens, 1.0),
            grad_norm=grad_norm,
            lr=lr,
            drift_mean=drift / max(drift_tokens, 1.0),
            drift_max=self.largest.item(),
        )


class StudentEngine:
    """Owns the student's parameters, gradients, optimizer and learning-rate schedule on its grid."""

    def __init__(self, config: TrainConfig, model: Model, grid: Grid) -> None:
        self.folder, self.arch, self.grid, self.config = model.folder, model.arch, grid, config
        self.method = METHODS[config.method]
        rank = config.lora.rank
        self._adapters = lora.all_adapter_slots(model.arch, rank) if rank else []
        with platform.current().megatron():
            self.model: Any = self._build_model(model.source)  # megatron-core is not typed
            self.optimizer = self._build_optimizer()
            self.scheduler = self._build_scheduler()
        self._weights = SpreadWeights(self._named, model.arch, grid, config.sampler.refit_bucket_bytes)
        self._memory = Offload(self._optimizer_tensors)

    def _build_model(self, source: loading.Source) -> Any:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed import finalize_model_grads as finalize

        settings = self.config.student
        mcore_config = transformer_config(
            self.arch, self.grid, sequence_parallel=settings.sequence_parallel, recompute=settings.recompute
        )
        model = build_model(self.arch, self.grid, mcore_config, with_head=True)
        platform.current().sum_gradients_in_fp32(model)
        if self._adapters:
            lora.add_adapters(model, self.arch, self.grid, self.config.lora, split=settings.sequence_parallel)
        self._named = loading.local_parameters(model, self.arch, self.grid)
        loading.load(self._named, self.arch, self.grid, source)
        loading.load(self._named, self.arch, self.grid, lora.fresh(self.config.seed), table=self._adapters)
        # megatron-core (0.16) marks experts as reduced over their own replicas only for ep > 1. It does not mark
        # transformer-engine's experts as different on each rank, so the gradient norm would leave out those of all
        # tensor-parallel ranks but the first.
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        groups = self.grid.groups
        # The token count passed by the schedule is ignored: gradients are sums, weights are in the loss.
        mcore_config.finalize_model_grads_func = lambda models, _tokens=None, **_: finalize(
            models, pg_collection=groups
        )
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed_optimizer
        )
        return DistributedDataParallel(mcore_config, ddp, model)

    def _build_optimizer(self) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        settings = self.config.optimizer
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=self._min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=self.config.student.distributed_optimizer,
            **platform.current().optimizer_config(),
        )
        return get_megatron_optimizer(optimizer, [self.model])

    @property
    def _min_lr(self) -> float:
        settings = self.config.optimizer
        return settings.lr * (settings.min_lr_ratio if settings.schedule == "cosine" else 1.0)

    def _build_scheduler(self) -> Any:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        settings, steps = self.config.optimizer, self.config.steps * self.config.epochs_per_batch
        scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=self._min_lr,
            lr_warmup_steps=min(steps - 1, round(settings.warmup_fraction * steps)),
            lr_decay_steps=steps + 1,  # the last step gets the schedule's last rate, not what follows it
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # A checkpoint restores how far the schedule has got; its parameters come from the configuration.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        scheduler.step(increment=1)  # the schedule counts from 0, where the rate is 0: step k trains with its k-th rate
        return scheduler

    def offload(self) -> None:
        """Move optimizer state and gradients to host memory until the next step, if so configured."""
        if self.config.student.offload:
            self._memory.away()
            with platform.current().megatron():
                self.model.offload_grad_buffers()

    def restore(self) -> None:
        """Undo `offload`."""
        if self.config.student.offload:
            self._memory.back()
            with platform.current().megatron():
                self.model.restore_grad_buffers()

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Master weights and moments, except master weights that are the model's own tensors."""
        model = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        for part in platform.optimizer_parts(self.optimizer):
            masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            states = [value for state in part.optimizer.state.values() for value in state.values()]
            for tensor in (*masters, *states):
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.untyped_storage().data_ptr() not in model:
                    yield tensor

    @property
    def head(self) -> Tensor | None:
        """This rank's shard of the output head `[padded vocab / tp, hidden]`; None off the last stage."""
        if not self.grid.is_last_stage:
            return None
        network = self.model.module
        return network.shared_embedding_or_output_weight() if self.arch.tied else network.output_layer.weight

    def source(self, *, adapted: bool = True, dtype: torch.dtype | None = None) -> loading.Source:
        """Full Hugging Face tensors of the current weights, adapters merged into them unless `adapted` is false; merged
        ones are of `dtype` (None: the weights'). Collective; see `GatheredSource` for their validity."""
        base = self._weights.source()
        if not (adapted and self._adapters):
            return base
        return lora.AdaptedSource(base, self._weights.source(self._adapters), self.arch, self.config.lora, dtype)

    def train_step(
        self,
        samples: Sequence[Sample],
        share: Sequence[int],
        teacher_hidden: Mapping[int, Tensor],
        teacher_head: Tensor | None,
    ) -> StepResult:
        """One optimizer step on this replica's `share` of the step's samples (weights of all samples' tokens sum to 1).

        `teacher_hidden`: sample -> `[response tokens, hidden_T]`, on the last stage; `teacher_head`:
        `[padded vocab / tp, hidden_T]`, sharded like the student's head. Collective.
        """
        sums = self.backward(samples, share, teacher_hidden, teacher_head)
        lr = self.optimizer.param_groups[0]["lr"]
        self._weights.settle()
        with platform.current().megatron():
            _, grad_norm, _ = self.optimizer.step()
            if grad_norm is None:  # megatron-core computes it only for clipping
                grad_norm = self.optimizer.get_grad_norm()
            self.scheduler.step(increment=1)
        if not math.isfinite(grad_norm):
            raise UserError(
                "the gradient is not finite: lower optimizer.lr, and --resume from the newest checkpoint if any"
            )
        return sums.result(grad_norm=float(grad_norm), lr=lr)

    def backward(
        self,
        samples: Sequence[Sample],
        share: Sequence[int],
        teacher_hidden: Mapping[int, Tensor],
        teacher_head: Tensor | None,
    ) -> _Sums:
        """Compute the gradients of a step, reduced over all replicas; arguments as in `train_step`."""
        self.restore()
        sums = _Sums(platform.current().device)

        def loss(batch: MicroBatch, hidden: Tensor) -> Tensor:
            assert teacher_head is not None
            student = batch.select(self.whole_sequence(hidden))
            if not batch.samples:  # a replica without samples: weights are zero, any teacher serves
                teacher = student.new_zeros(len(batch.weights), teacher_head.shape[1])
                return self._divergence(batch, student, teacher, teacher_head).loss
            teacher = torch.cat([teacher_hidden[sample] for sample in batch.samples])
            fused = self._divergence(batch, student, teacher, teacher_head)
            first = sums.batches == 0
            drift = self._drift(batch, student.detach(), teacher, teacher_head) if first else None
            sums.add(fused, drift, counted=self.grid.tp_rank == 0)
            return fused.loss

        with platform.current().megatron():
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
        settings = self.config.student
        batches = batches_of(
            samples, share, "student", size=settings.micro_batch_size, grid=self.grid, split=settings.sequence_parallel
        )
        run_schedule(self.model, self.grid, batches, loss)
        return sums

    def _divergence(self, batch: MicroBatch, student: Tensor, teacher: Tensor, teacher_head: Tensor) -> FusedDivergence:
        head = self.head
        assert head is not None
        return fused_linear_divergence(
            student,
            head,
            teacher,
            teacher_head,
            batch.weights,
            group=self.grid.groups.tp,
            vocab_size=self.arch.vocab_size,
            chunk_tokens=self.config.loss.chunk_tokens,
            accumulate=True,
            **self.method.divergence.arguments(self.config.loss),
        )

    def rollout_drift(self, rollouts: Sequence[Sample]) -> float:
        """Mean |sampler - trainer| log-probability of the rollouts' tokens under the current weights, nats.

        Uses one rollout per replica, which the caller keeps as short as possible. Collective.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=platform.current().device)  # nats, tokens
        replica, split = self.grid.dp_rank, self.config.student.sequence_parallel
        mine = [replica] if replica < len(rollouts) else []
        batches = batches_of(rollouts, mine, "student", size=1, grid=self.grid, split=split)

        def difference(batch: MicroBatch, hidden: Tensor) -> Tensor:
            head = self.head
            assert head is not None
            found = self._difference(batch, batch.select(self.whole_sequence(hidden)), head)
            return found if batch.samples else found[:0]

        for drift in run_schedule(self.model, self.grid, batches, keep=difference):
            if self.grid.tp_rank == 0:
                totals += torch.stack([drift.sum(dtype=torch.float64), totals.new_tensor(len(drift))])
        dist.all_reduce(totals)
        drift, tokens = totals.tolist()
        return drift / max(tokens, 1.0)

    def whole_sequence(self, hidden: Tensor) -> Tensor:
        """Undo sequence parallelism: `[s/tp, b, h]` -> `[s, b, h]`.

        The loss gives a gradient that is already complete on every rank, so backward takes this rank's slice of it
        rather than reducing it a second time.
        """
        if not self.config.student.sequence_parallel:
            return hidden
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        with platform.current().megatron():
            whole: Tensor = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.grid.groups.tp
            )
        return whole

    def _drift(self, batch: MicroBatch, student: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        """The same for trained tokens, under the model that sampled the trajectory."""
        hidden, head = (teacher, teacher_head) if self.method.refines else (student, self.head)
        assert head is not None
        return self._difference(batch, hidden, head)

    def _difference(self, batch: MicroBatch, hidden: Tensor, head: Tensor) -> Tensor:
        """|sampler - trainer| log-probability of `log.drift_tokens` tokens, evenly spaced over the batch: a fault may
        affect only positions far from the first (rotary embeddings, blocks of attention)."""
        last = len(batch.response) - 1
        count = min(self.config.log.drift_tokens, last + 1)
        rows = torch.linspace(0, last, count, dtype=torch.float64, device=hidden.device).long()
        trainer = vocab_parallel_log_prob(
            hidden[rows],
            head.detach(),
            batch.response[rows],
            group=self.grid.groups.tp,
            vocab_size=self.arch.vocab_size,
        )
        return (trainer - batch.sampler_log_probs[rows]).abs()
