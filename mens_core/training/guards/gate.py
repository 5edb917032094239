"""The gate around one run: what is measured for the verdicts, and when.

Before the first step the base's loss over the first window; after the last one the loss of that window's first batch
three times: with the adapter, without it, and with the adapter as it was read from the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np

from mens_core.artifacts.adapter import initial_state
from mens_core.artifacts.adapters import open_adapter
from mens_core.backend import Backend
from mens_core.errors import HookContractError, TrainingError
from mens_core.exchange import Batch, TrainingState
from mens_core.plan import ExecutionPlan
from mens_core.text.encode import Encoder
from mens_core.text.pack import Batching, total_steps
from mens_core.text.tokens import TokenRows
from mens_core.training.guards import after, before
from mens_core.training.guards.verdict import Judge
from mens_core.training.schedule import learning_rate, warmup_for

__all__ = ["Gate"]


@attrs.define(kw_only=True)
class Gate:
    """Measures for the guards, with restored states that the run never sees.

    Attributes:
        plan: of the run.
        backend: that trains.
        judge: hears of every verdict.
        rows: that are trained on.
    """

    plan: ExecutionPlan
    backend: Backend
    judge: Judge
    rows: TokenRows
    _base: TrainingState = attrs.field(init=False)
    _batch: Batch = attrs.field(init=False)
    _base_loss: float = attrs.field(init=False)
    _loss: float = attrs.field(init=False)

    def rows_are_fit(self, encoder: Encoder) -> None:
        """Judge rows and learning rate, before the base is loaded.

        Raises:
            TrainingError: naming the guard that failed.
        """
        spec = self.plan.contract.training
        total = total_steps(Batching.of(self.plan.contract).steps(self.rows), spec)
        warmup = warmup_for(total, spec.warmup_steps)
        rates = (
            learning_rate(step, schedule=spec.schedule, peak=spec.learning_rate, warmup_steps=warmup, total_steps=total)
            for step in range(total)
        )
        self.judge.record(
            before.zero_rate(rates),
            before.every_window_supervised(self.rows),
            before.end_of_turn_supervised(self.rows, encoder),
            before.ids_in_vocabulary(self.rows, self.plan.layout.vocab_size),
        )

    def begin(self, session: Any, opened: TrainingState, start: TrainingState) -> Any:
        """Judge the session that is to train.

        Args:
            session: freshly opened.
            opened: its state.
            start: the adapter that the run begins with.

        Returns:
            The session, which holds the start.

        Raises:
            TrainingError: naming the guard that failed.
        """
        contract = self.plan.contract
        shapes = {name: tensor.shape for name, tensor in opened.adapter.items()}
        self.judge.record(before.trainable_set(shapes, self.plan.layout, contract.adapter))
        window = next(Batching.of(contract).windows(self.rows, 0))
        self._batch, self._base = window[0], initial_state(opened.adapter, contract.training.seed)
        session = self.backend.restore(session, self._base)
        self._measure_base(session, window)
        new = contract.adapter.start_from is None
        session = self.backend.restore(session, start)
        self.judge.record(before.adapter_identity(start, self.backend.state(session), new=new))
        return session

    def end(self, session: Any, start: TrainingState, end: TrainingState) -> Any:
        """Judge what was trained.

        Args:
            session: holding the end.
            start: the adapter that the run began with.
            end: the one that it gives.

        Returns:
            The session, which holds the base alone.

        Raises:
            TrainingError: naming the guard that failed.
        """
        self.judge.record(after.adapter_changed(start, end))
        self._loss = self.backend.loss(session, self._batch)[0]
        session = self.backend.restore(session, self._base)
        base_now = self.backend.loss(session, self._batch)[0]
        self.judge.record(
            after.base_unchanged(self._base_loss, base_now), after.differs_from_base(self._base_loss, self._loss)
        )
        return session

    def written(self, session: Any, end: TrainingState, folder: Path) -> None:
        """Judge the adapter on the disk.

        Args:
            session: any of the run's.
            end: the adapter that was written.
            folder: that it was written into.

        Raises:
            TrainingError: naming the guard that failed.
        """
        read = open_adapter(folder).trained()
        session = self.backend.restore(session, TrainingState(adapter=read, optimizer={}, step=0))
        loss = self.backend.loss(session, self._batch)[0]
        self.judge.record(after.reload_gives_the_same(end.adapter, read, self._loss, loss))

    def _measure_base(self, session: Any, window: list[Batch]) -> None:
        vocabulary = self.plan.layout.vocab_size
        try:
            sums = [self.backend.loss(session, batch) for batch in window]
        except HookContractError as error:
            try:
                self.judge.record(before.first_loss(None, vocabulary, error.what))
            except TrainingError as failed:
                raise failed from error
            raise
        self._base_loss = sums[0][0]
        loss = float(np.sum([total for total, _ in sums])) / sum(count for _, count in sums)
        self.judge.record(before.first_loss(loss, vocabulary))
