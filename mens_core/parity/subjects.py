"""Which model and which backends a certificate is about."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mens_core.errors import GateError
from mens_core.hf.layout import GRAPHS
from mens_core.parity.certificate import certificate
from mens_core.parity.kernels import PlanFor, Subject, compare_kernels
from mens_core.parity.models import write_family
from mens_core.parity.witness import obstacle_to_oracle
from mens_core.plan import ExecutionPlan
from mens_core.plugins import installed_backends

__all__ = ["able_backends", "certify_run", "refuse_uncertified", "tiny_model"]

_SHOWN = 8


@contextmanager
def tiny_model(family: str) -> Iterator[tuple[str, Path]]:
    """Label and folder of a family's tiny model, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), family)
        yield f"tiny {family}", Path(folder)


def able_backends(
    folder: Path, plan_for: PlanFor, fields: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the installed backends that can run a model in float32, and for each other one why not.

    Args:
        folder: of the model.
        plan_for: turns fields into a plan in float32.
        fields: of the contract beside the model and the backend.

    Raises:
        GateError: if none can, or the model itself is refused.
    """
    names, notes = [], []
    for info in installed_backends():
        if info.missing:
            notes.append(f"{info.name} takes no part: it needs {', '.join(info.missing)}")
            continue
        try:
            plan_for({**(fields or {}), "model": str(folder), "backend": f"{info.name}_lora"})
        except GateError as error:
            if "backend_available" not in error.codes:
                raise
            notes.append(f"{info.name} takes no part: {error.what}")
        else:
            names.append(info.name)
    if not names:
        raise GateError("no backend can run the model in float32", where=folder, expected="\n".join(notes))
    return tuple(names), tuple(notes)


def certify_run(plan: ExecutionPlan, plan_for: PlanFor) -> dict[str, Any]:
    """The certificate of a run's kernel: on its own base, or where that is too large on its family's tiny model.

    Args:
        plan: of the run.
        plan_for: turns fields into a plan in float32.

    Raises:
        PluginError: if there is nothing to hold the kernel to.
    """
    obstacle, family = obstacle_to_oracle(plan.layout, plan.weights.parameters), plan.layout.family
    if obstacle is not None and family in GRAPHS:
        note = f"not on {plan.model_name} itself: {obstacle}"
        with tiny_model(str(family)) as (label, folder):
            return certificate([_compared(plan, plan_for, label, folder, (note,))])
    own = {"targets": plan.contract.adapter.targets}
    return certificate([_compared(plan, plan_for, plan.model_name, plan.model_dir, (), own)])


def refuse_uncertified(found: dict[str, Any]) -> None:
    """Raise for a certificate that does not hold.

    Raises:
        GateError: with the comparisons that fail.
    """
    if found["passed"]:
        return
    failed = [each for model in found["models"] for each in model["comparisons"] if not each["passed"]]
    lines = [
        f"  - {each['what']}, {each['left']} and {each['right']}: {each['max_error']}, bound {each['tolerance']}"
        for each in failed[:_SHOWN]
    ]
    lines += [f"  - and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else []
    raise GateError(
        f"[parity_certified] {len(failed)} of {found['comparisons']} comparisons do not hold:\n" + "\n".join(lines),
        fix="python -m mens_core parity writes the whole certificate; to train all the same, leave out --certify",
        codes=("parity_certified",),
    )


def _compared(
    plan: ExecutionPlan,
    plan_for: PlanFor,
    label: str,
    folder: Path,
    notes: tuple[str, ...],
    own: dict[str, Any] | None = None,
) -> dict[str, Any]:
    adapter, quant = plan.contract.adapter, plan.contract.quant
    fields = {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "rslora": adapter.rslora,
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
        "modules_to_save": adapter.modules_to_save,
        "block_size": quant.block_size,
        "double_quant": quant.double_quant,
        **(own or {}),
    }
    able, left_out = able_backends(folder, plan_for, fields)
    if plan.dtype != "float32":
        notes = (*notes, f"in float32; the run itself computes in {plan.dtype}")
    subject = Subject(
        label=label,
        folder=folder,
        # The run's own backend takes part whether it is able or not: then its plan says why.
        backends=(plan.backend, *(name for name in able if name != plan.backend)),
        methods=(adapter.method,),
        fields=fields,
        notes=(*notes, *left_out),
    )
    return compare_kernels(subject, plan_for)
