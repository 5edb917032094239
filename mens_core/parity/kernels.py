"""All comparisons of one model: every pair of backends, and every backend with the specification."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.errors import PluginError
from mens_core.parity.comparison import Comparison
from mens_core.parity.graph import compare_graphs, compare_loss
from mens_core.parity.learning import (
    UNBOUNDED,
    WEIGHT_DECAY,
    compare_accumulation,
    compare_gradients,
    compare_gradients_with_oracle,
    compare_runs,
    compare_runs_with_oracle,
    compare_updates,
    compare_updates_with_oracle,
)
from mens_core.parity.material import Material, adapter_like
from mens_core.parity.models import write_with_huge_logits
from mens_core.parity.schedules import compare_schedules
from mens_core.parity.storage import compare_storage, compare_storage_with_oracle
from mens_core.parity.witness import BackendWitness, OracleWitness, Witness, obstacle_to_oracle
from mens_core.plan import ExecutionPlan

__all__ = ["PlanFor", "Subject", "compare_kernels"]

PlanFor: TypeAlias = "Callable[[Mapping[str, Any]], tuple[ExecutionPlan, Backend]]"
"""Fields of a contract to a plan in float32 and its backend, loaded; the planner's part."""

Arrays = Mapping[str, NDArray[np.float32]]


@attrs.frozen(kw_only=True)
class Subject:
    """What a certificate is about.

    Attributes:
        label: the family or the model, for people.
        folder: of the model.
        backends: names, at least one.
        methods: ``lora``, ``qlora`` or both.
        fields: of the contract, for the adapter and the storage of the base.
        notes: what a reader should know beforehand.
    """

    label: str
    folder: Path
    backends: tuple[str, ...]
    methods: tuple[str, ...]
    fields: Mapping[str, Any] = attrs.field(factory=lambda: {"rank": 4, "alpha": 8.0})
    notes: tuple[str, ...] = ()


def compare_kernels(subject: Subject, plan_for: PlanFor) -> dict[str, Any]:
    """Run every comparison.

    Args:
        subject: which model, which backends.
        plan_for: turns fields into a plan.

    Returns:
        The certificate's part on this model: kernels, notes and comparisons, ready for JSON.

    Raises:
        PluginError: if there is nothing to compare a single backend with.
        MensError: as plans and sessions raise.
    """
    plan, _ = plan_for(_fields(subject, subject.backends[0], subject.methods[0]))
    obstacle = obstacle_to_oracle(plan.layout, plan.weights.parameters)
    if obstacle is not None and len(subject.backends) < 2:
        raise PluginError(
            f"there is nothing to hold backend {subject.backends[0]!r} to: {obstacle}",
            where=subject.label,
            fix="install a second backend (python -m mens_core backends), or take --family",
        )
    described: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    for method in subject.methods:
        plans = [plan_for(_fields(subject, name, method)) for name in subject.backends]
        described |= {plan.execution_kernel: _described(plan, backend) for plan, backend in plans}
        witness = _Witnesses(subject=subject, method=method, plan_for=plan_for, plans=plans, alone=obstacle is not None)
        comparisons += [_named(found, method) for found in witness.compare()]
        if method == subject.methods[0]:
            comparisons += _session_free([backend for _, backend in plans])
    notes = [*subject.notes]
    if obstacle is not None:
        notes.append(f"the backends are held to each other only: {obstacle}")
    if len(subject.backends) < 2:
        notes.append(f"{subject.backends[0]} is held to the specification only; no second backend took part")
    return {
        "model": subject.label,
        "model_type": plan.layout.model_type,
        "layers": plan.layout.num_layers,
        "parameters": plan.weights.parameters,
        "contents": dict(plan.contents),
        "kernels": described,
        "notes": notes,
        "passed": all(found.passed for found in comparisons),
        "comparisons": [found.as_dict() for found in comparisons],
    }


@attrs.frozen(kw_only=True)
class _Witnesses:
    """The comparisons of one method.

    Attributes:
        subject: of the certificate.
        method: ``lora`` or ``qlora``.
        plan_for: for further sessions.
        plans: of each backend.
        alone: whether the specification takes no part.
    """

    subject: Subject
    method: str
    plan_for: PlanFor
    plans: Sequence[tuple[ExecutionPlan, Backend]]
    alone: bool

    def compare(self) -> Iterator[Comparison]:
        layout = self.plans[0][0].layout
        material, layers = Material.of(layout), layout.num_layers
        backends = [BackendWitness.open(plan, backend, material.shape) for plan, backend in self.plans]
        adapter = adapter_like(backends[0].empty_adapter)
        for left, right in itertools.combinations(backends, 2):
            yield from compare_graphs(left, right, adapter, material, layers)
            yield from compare_gradients(left, right, adapter, material, layers)
            if self.method == self.subject.methods[0]:
                yield from compare_runs(left, right, adapter, material)
        for witness in backends:
            oracle = None if self.alone else OracleWitness.like(witness)
            if oracle is not None:
                yield from compare_graphs(witness, oracle, adapter, material, layers)
                yield from compare_gradients_with_oracle(witness, oracle, adapter, material, layers)
            if self.method == self.subject.methods[0]:
                yield from compare_accumulation(witness, adapter, material)
                if oracle is not None:
                    yield from compare_runs_with_oracle(witness, oracle, adapter, material, layers)
        if self.method == self.subject.methods[0]:
            yield from self._updates(backends, adapter, material)
            if not self.alone:
                yield from self._huge_logits(adapter, material, layers)

    def _updates(self, backends: Sequence[BackendWitness], adapter: Arrays, material: Material) -> Iterator[Comparison]:
        """In sessions of their own, for clipping is the session's; it halves the gradient."""
        told = [witness.gradient(adapter, material.windows(4)[0]) for witness in backends]
        clipping = self._opened({"max_grad_norm": 0.5 * min(step.norm for _, step in told)}, material)
        for left, right in itertools.combinations(clipping, 2):
            yield from compare_updates(left, right, adapter, material)
        for (gradient, _), session in zip(told, clipping, strict=True):
            yield from compare_updates_with_oracle(session, gradient, adapter, material)

    def _huge_logits(self, adapter: Arrays, material: Material, layers: int) -> Iterator[Comparison]:
        """Of a copy of the model: logits whose powers no float32 holds."""
        with tempfile.TemporaryDirectory() as folder:
            write_with_huge_logits(self.subject.folder, Path(folder))
            witnesses = self._opened({"model": folder}, material)
            oracles = [OracleWitness.like(witness) for witness in witnesses]
            pairs: list[tuple[Witness, Witness]] = list(itertools.combinations(witnesses, 2))
            pairs += zip(witnesses, oracles, strict=True)
            for left, right in pairs:
                what = "loss of logits a hundred times as large"
                yield compare_loss(what, left, right, adapter, material.batch, layers)

    def _opened(self, further: Mapping[str, Any], material: Material) -> list[BackendWitness]:
        fields = [{**_fields(self.subject, name, self.method), **further} for name in self.subject.backends]
        return [BackendWitness.open(*self.plan_for(each), material.shape) for each in fields]


def _fields(subject: Subject, backend: str, method: str) -> dict[str, Any]:
    return {
        **subject.fields,
        "model": str(subject.folder),
        "backend": f"{backend}_{method}",
        "max_grad_norm": UNBOUNDED,
        "weight_decay": WEIGHT_DECAY,
        "dropout": 0.0,
    }


def _session_free(backends: Sequence[Backend]) -> list[Comparison]:
    found = [each for pair in itertools.combinations(backends, 2) for each in compare_storage(*pair)]
    found += [each for backend in backends for each in compare_storage_with_oracle(backend)]
    return [*found, *compare_schedules()]


def _named(found: Comparison, method: str) -> Comparison:
    return attrs.evolve(found, what=f"{method}: {found.what}")


def _described(plan: ExecutionPlan, backend: Backend) -> dict[str, str]:
    return {"plugin": backend.plugin, "device": plan.device, "dtype": plan.dtype}
