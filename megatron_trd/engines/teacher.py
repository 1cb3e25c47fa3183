"""The teacher: hidden states of response positions, computed on its own grid and sent to the student's last stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.batching import Sample, deal, micro_batches
from megatron_trd.engines.schedule import batch_count, run_schedule
from megatron_trd.engines.student import StudentEngine
from megatron_trd.errors import UserError
from megatron_trd.models import loading, weights
from megatron_trd.models.architecture import Architecture, build_model, transformer_config
from megatron_trd.models.gathering import GatheredSource
from megatron_trd.models.model import Model
from megatron_trd.parallel.exchange import Route, exchange_hidden
from megatron_trd.parallel.grid import Grid, Layout, teacher_grid


class TeacherEngine:
    """A teacher without gradients: a separate checkpoint, or the student's own weights (frozen, live or averaged)."""

    def __init__(self, config: TrainConfig, student: StudentEngine, model: Model) -> None:
        self.config, self.student = config, student
        own = config.teacher.model is None
        self.live = own and config.teacher.weights == "live"
        self.averaged = own and config.teacher.weights == "ema"
        self.frozen = not self.live and not self.averaged
        self.grid: Grid = student.grid
        self.arch, self.folder = model.arch, model.folder
        self.model: torch.nn.Module = student.model
        self._head: Tensor | None = None
        if not self.live:
            self._build()
            self.load(model.source)

    def _build(self) -> None:
        settings = self.config.teacher
        self.grid = teacher_grid(settings.tp, settings.pp, settings.ep)
        with platform.current().megatron():
            mcore_config = transformer_config(self.arch, self.grid)
            self.model = build_model(self.arch, self.grid, mcore_config, with_head=False)
        self.model.requires_grad_(False).eval()

    def load(self, source: loading.Source) -> None:
        """Take the weights of a model of this teacher's architecture."""
        loading.load(self.model, self.arch, self.grid, source)
        self._head = self._head_shard(source)

    def _head_shard(self, source: loading.Source) -> Tensor | None:
        """The teacher's output head, cut over the vocabulary the way the student's is; None off its last stage."""
        grid = self.student.grid
        if not grid.is_last_stage:
            return None
        slot = weights.slots(self.arch)[-1]
        part = weights.shard(slot, source(slot), self.arch, grid.tp_rank, grid.layout.tp)
        settings = platform.current()
        return part.to(settings.device, settings.dtype, copy=True)

    @property
    def head(self) -> Tensor | None:
        """`[padded vocab / student tp, hidden_T]` on the student's last stage, None elsewhere."""
        if self.live:
            return None if self.student.head is None else self.student.head.detach()
        return self._head

    def update(self) -> None:
        """After an optimizer step: move an averaged teacher towards the student. Collective."""
        if not self.averaged:
            return
        decay = self.config.teacher.ema_decay
        loading.load(self.model, self.arch, self.grid, self.student.source(), decay=decay, all_slots=True)
        if self._head is not None and self.student.head is not None:
            self._head.lerp_(self.student.head.detach().to(self._head), 1.0 - decay)

    def source(self) -> loading.Source:
        """Full Hugging Face tensors of the present weights, as `StudentEngine.source`; the head is the loss's own."""
        if self.live:
            return self.student.source()
        size = self.config.sampler.refit_bucket_mib * 2**20
        named = loading.local_parameters(self.model, self.arch, self.grid)
        *table, head = weights.slots(self.arch)
        body = GatheredSource(named, self.arch, self.grid, size, table)
        if self.arch.tied:
            return body
        shard = {} if self._head is None else {head.megatron[0]: self._head}
        last = GatheredSource(shard, self.arch, self.student.grid, size, [head])
        return lambda slot: last(slot) if slot == head else body(slot)

    def hidden(self, samples: Sequence[Sample], student_shares: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Hidden states after the final norm at response positions, `[tokens, hidden_T]` by sample index.

        Each student replica's last stage gets the samples of its share; other ranks get an empty one. Collective.
        """
        settings = self.config.teacher
        layout, device = self.grid.layout, platform.current().device
        shares = deal(samples, layout.dp, cost=lambda sample: len(sample.tokens("teacher")))
        sequence_parallel = self.live and self.config.student.sequence_parallel
        batches = micro_batches(
            samples,
            shares[self.grid.dp_rank],
            "teacher",
            size=settings.micro_batch_size,
            multiple=layout.tp if sequence_parallel else 1,
            device=device,
            count=batch_count(len(shares[self.grid.dp_rank]), settings.micro_batch_size, self.grid),
        )
        outputs = run_schedule(self.model, self.grid, batches)
        made: dict[int, Tensor] = {}
        for batch, hidden in zip(batches, outputs, strict=bool(outputs)):
            whole = self.student.whole_sequence(hidden) if self.live else hidden
            made.update(zip(batch.samples, batch.select(whole).split(batch.lengths), strict=bool(batch.samples)))
        return self._send(samples, shares, student_shares, made, layout)

    def _send(
        self,
        samples: Sequence[Sample],
        teacher_shares: Sequence[Sequence[int]],
        student_shares: Sequence[Sequence[int]],
        made: dict[int, Tensor],
        layout: Layout,
    ) -> dict[int, Tensor]:
        teacher_of = {index: dp for dp, share in enumerate(teacher_shares) for index in share}
        student_of = {index: dp for dp, share in enumerate(student_shares) for index in share}
        routes = [
            Route(index, len(sample.response), teacher_of[index], student_of[index])
            for index, sample in enumerate(samples)
        ]
        current = platform.current()
        student = self.student.grid.layout
        return exchange_hidden(routes, made, layout, student, self.arch.hidden_size, current.dtype, current.device)


def check_teacher(student: Architecture, teacher: Architecture) -> None:
    """Raise `UserError` if the two do not share a vocabulary."""
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"teacher.model has a vocabulary of {teacher.vocab_size}, the student of {student.vocab_size}: "
            "full-vocabulary distillation needs one tokenizer for both"
        )
