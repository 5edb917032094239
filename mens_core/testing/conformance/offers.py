"""``mens_plan``, and whether the backend is what its capabilities say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mens_core.contract import METHODS, FineTuneContract
from mens_core.errors import MensError, PluginError
from mens_core.exchange import GenerateSettings
from mens_core.hf.layout import GRAPHS, read_layout
from mens_core.plan import BaseWeights, KernelOffer
from mens_core.testing import tiny
from mens_core.testing.conformance.capabilities import CAPABILITIES, Closed
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench

__all__ = [
    "test_a_capability_is_what_it_is_declared_to_be",
    "test_an_offer_needs_no_weights",
    "test_every_hook_of_a_run_is_implemented",
    "test_the_same_question_gets_the_same_offer",
]

_RUN = ("mens_plan", "mens_open", "mens_forward", "mens_loss", "mens_step", "mens_state", "mens_restore")


def _offer(workbench: Workbench, family: str, **fields: Any) -> KernelOffer:
    """What is offered for a base of which only config.json is looked at."""
    given = {"device": workbench.capabilities.device, "model": "/a/folder/that/is/not/there"} | fields
    contract = FineTuneContract.from_fields(trains=False, **given)
    weights = BaseWeights(parameters=1000, stored_bytes=4000, linears={"a": (8, 8)})
    layout = read_layout(workbench.folder(family))
    return workbench.backend.plan(contract, layout, tiny.MACHINE, weights, tiny.WORKLOAD)


def test_every_hook_of_a_run_is_implemented(workbench: Workbench) -> None:
    hooks = workbench.backend.manager.hook
    for name in _RUN:
        found = getattr(hooks, name).get_hookimpls()
        if not found:
            pytest.fail(f"{name} is not implemented, and no run is possible without it", pytrace=False)
        promise(len(found) == 1, name, "", f"{len(found)} functions answer, and only one of them is heard")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_question_gets_the_same_offer(workbench: Workbench, method: str) -> None:
    first, second = (_offer(workbench, workbench.any_family, method=method) for _ in range(2))
    promise(first == second, "mens_plan", "the same arguments give the same offer", f"{first}, then {second}")
    expected = f"{workbench.capabilities.backend}_{method}"
    promise(first.kernel == expected, "mens_plan", "``<backend>_<method>``", f"offers the kernel {first.kernel!r}")


def test_an_offer_needs_no_weights(workbench: Workbench) -> None:
    offer = _offer(workbench, workbench.any_family, dtype="float32")
    promise(offer.feasible, "mens_plan", "Must not read weights", f"without weights it declines: {offer.reason}")


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_capability_is_what_it_is_declared_to_be(workbench: Workbench, name: str) -> None:
    declared = getattr(workbench.capabilities, name)
    obstacle = _obstacle(workbench, name)
    if isinstance(declared, Closed) and obstacle is None:
        pytest.fail(
            f"{name} is closed ({declared.reason}), but works: {CAPABILITIES[name]}; declare it OPEN", pytrace=False
        )
    if not isinstance(declared, Closed) and obstacle is not None:
        pytest.fail(f"{name} is OPEN, but {obstacle}: {CAPABILITIES[name]}; declare it closed", pytrace=False)


def _obstacle(workbench: Workbench, name: str) -> str | None:
    """Why the backend, asked, does not do it; None if it does."""
    if name in {"generate", "merge"}:
        return _refused(workbench, name)
    family = name if name in GRAPHS else workbench.any_family
    asked: dict[str, dict[str, Any]] = {
        "qlora": {"method": "qlora"},
        "dropout": {"dropout": 0.3},
        "patterns": {"rank_pattern": {"a": 2}},
        "modules_to_save": {"modules_to_save": ("lm_head",)},
        "bfloat16": {"dtype": "bfloat16"},
    }
    offer = _offer(workbench, family, **asked.get(name, {}))
    if offer.feasible and name == "whole" and not offer.whole:
        return "its offer does not say so"
    if offer.feasible and name == "bfloat16" and offer.dtype != "bfloat16":
        return f"it offers {offer.dtype} where bfloat16 is asked for"
    return None if offer.feasible else f"mens_plan declines: {offer.reason}"


def _refused(workbench: Workbench, name: str) -> str | None:
    backend, ones = workbench.backend, np.ones((2, 2), np.float32)
    one_token = GenerateSettings(max_new_tokens=1, stop_tokens=())
    try:
        if name == "merge":
            backend.merge(ones, ones, ones, 1.0)
        else:
            backend.generate(workbench.session(workbench.any_family), [3], one_token)
    except PluginError as error:
        return f"its hook answers: {error.what}"
    except MensError as error:
        return f"its hook refuses: {error.what}"
    return None
