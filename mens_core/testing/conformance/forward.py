"""``mens_forward`` and ``mens_loss``."""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import IGNORE, TrainingState
from mens_core.testing import tiny
from mens_core.testing.conformance import tolerances
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.reference import Reference
from mens_core.testing.conformance.workbench import Workbench, untouched

__all__ = [
    "test_a_fresh_adapter_is_exactly_the_identity",
    "test_a_loss_is_that_of_the_specification",
    "test_a_row_does_not_feel_the_other_rows",
    "test_logits_are_those_of_the_specification",
    "test_logits_in_bfloat16_are_near_the_specification",
    "test_no_position_sees_what_comes_later",
    "test_nothing_supervised_costs_nothing",
    "test_qlora_has_the_nf4_base_of_the_specification",
    "test_the_same_batch_gives_the_same_bits",
]

_BATCH = tiny.batch_of(9, 5, 12, 1)


def _distance(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    return float(np.abs(left - right).max())


def test_logits_are_those_of_the_specification(workbench: Workbench, family: str) -> None:
    session, adapter = workbench.adapted(family)
    with untouched(_BATCH) as unchanged:
        found = workbench.backend.forward(session, _BATCH)
    expected = Reference(workbench.plan(family)).logits(adapter, _BATCH)
    promise(unchanged[0], "mens_forward", "adapter included", "the batch it was given was changed")
    promise(found.shape == expected.shape, "mens_forward", "(T, V)", f"shape {found.shape}, not {expected.shape}")
    far = _distance(found, expected)
    promise(
        far <= tolerances.LOGITS,
        "mens_forward",
        "Logits of every position, adapter included",
        f"{family}: logits are up to {far:.3g} from the specification's, {tolerances.LOGITS} is allowed",
    )


def test_qlora_has_the_nf4_base_of_the_specification(workbench: Workbench, family: str) -> None:
    workbench.needs("qlora")
    session, adapter = workbench.adapted(family, method="qlora")
    expected = Reference(workbench.plan(family, method="qlora")).logits(adapter, _BATCH)
    far = _distance(workbench.backend.forward(session, _BATCH), expected)
    promise(
        far <= tolerances.LOGITS,
        "mens_quantize",
        "byte for byte",
        f"{family}: logits on the NF4 base are up to {far:.3g} from the specification's",
    )


def test_logits_in_bfloat16_are_near_the_specification(workbench: Workbench) -> None:
    workbench.needs("bfloat16")
    family = workbench.any_family
    session, adapter = workbench.adapted(family, dtype="bfloat16")
    far = _distance(
        workbench.backend.forward(session, _BATCH), Reference(workbench.plan(family)).logits(adapter, _BATCH)
    )
    promise(far <= tolerances.BFLOAT16_LOGITS, "mens_forward", "Logits", f"{family}: logits are up to {far:.3g} off")


def test_a_row_does_not_feel_the_other_rows(workbench: Workbench) -> None:
    session, _ = workbench.adapted(workbench.any_family)
    together = workbench.backend.forward(session, _BATCH)
    alone = np.concatenate([workbench.backend.forward(session, row) for row in tiny.rows_of(_BATCH)])
    far = _distance(together, alone) / float(np.abs(alone).max())
    promise(
        far <= tolerances.PACKING,
        "mens_forward",
        "the same logits as when it is alone in its batch",
        f"a row's logits change by {far:.3g} of the largest when other rows stand beside it",
    )


def test_no_position_sees_what_comes_later(workbench: Workbench) -> None:
    session, _ = workbench.adapted(workbench.any_family)
    tokens = _BATCH.input_ids.copy()
    tokens[6] = 3 + (tokens[6] - 2) % (tiny.VOCABULARY - 3)
    before, after = (
        workbench.backend.forward(session, tiny.with_tokens(_BATCH, ids)) for ids in (_BATCH.input_ids, tokens)
    )
    far = _distance(before[:6], after[:6])
    promise(far == 0, "mens_forward", "Logits of every position", f"a later token moves earlier logits by {far:.3g}")
    deaf = (np.abs(before[6:9] - after[6:9]).max(axis=1) <= tolerances.LOGITS).any()
    promise(not deaf, "mens_forward", "Logits of every position", "a position does not see a token before it")


def test_a_fresh_adapter_is_exactly_the_identity(workbench: Workbench) -> None:
    family, backend = workbench.any_family, workbench.backend
    session = workbench.open(family)
    opened = backend.forward(session, _BATCH)
    far = _distance(opened, Reference(workbench.plan(family)).logits({}, _BATCH))
    promise(far <= tolerances.LOGITS, "mens_open", "must be the identity", f"logits are {far:.3g} from the base's")
    start = backend.state(session)
    half = {name: array * (".lora_A." in name) for name, array in tiny.random_adapter(start.adapter).items()}
    session = backend.restore(session, TrainingState(adapter=half, optimizer={}, step=0))
    far = _distance(backend.forward(session, _BATCH), opened)
    promise(far == 0, "mens_open", "must be the identity", f"with B zero logits differ from the base's by {far:.3g}")


def test_the_same_batch_gives_the_same_bits(workbench: Workbench) -> None:
    backend, found = workbench.backend, []
    for _ in range(2):
        session, _adapter = workbench.adapted(workbench.any_family)
        metrics = backend.step(session, [_BATCH], 1e-2)
        found.append((float(metrics.loss_sum), float(metrics.grad_norm), backend.forward(session, _BATCH).tobytes()))
    promise(found[0] == found[1], "mens_step", "goes on bit for bit", "the same step from the same state differs")


def test_a_loss_is_that_of_the_specification(workbench: Workbench) -> None:
    family = workbench.any_family
    session, adapter = workbench.adapted(family)
    with untouched(_BATCH) as unchanged:
        total, _ = workbench.backend.loss(session, _BATCH)
    promise(unchanged[0], "mens_loss", "without a gradient", "the batch it was given was changed")
    expected = Reference(workbench.plan(family)).loss(adapter, [_BATCH])
    promise(
        abs(total - expected) <= tolerances.LOSS * expected,
        "mens_loss",
        "sum over the supervised tokens, in nats",
        f"{family}: {total}, the specification has {expected}",
    )


def test_nothing_supervised_costs_nothing(workbench: Workbench) -> None:
    silent = attrs.evolve(_BATCH, targets=np.full_like(_BATCH.targets, IGNORE))
    found = workbench.backend.loss(workbench.session(workbench.any_family), silent)
    promise(found == (0.0, 0), "mens_loss", "(0.0, 0) if none is supervised", f"answered {found}")
