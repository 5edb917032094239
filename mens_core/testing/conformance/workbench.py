"""What the tests share: the backend, tiny models, sessions that are opened once and reset for each use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.exchange import Batch, TrainingState
from mens_core.hf.layout import GRAPHS
from mens_core.plan import ExecutionPlan
from mens_core.plugins import load_backend
from mens_core.testing import tiny
from mens_core.testing.conformance.capabilities import OPEN, Closed, declaration_problems

__all__ = ["family", "workbench"]

Adapter = dict[str, NDArray[np.float32]]


@attrs.define(kw_only=True, eq=False)
class Workbench:
    """One backend under test.

    Attributes:
        backend: loaded through the front door.
        capabilities: the test module's class.
        root: a folder for models.
    """

    backend: Backend
    capabilities: Any
    root: Path
    _opened: dict[Any, tuple[Any, TrainingState]] = attrs.field(factory=dict)

    def needs(self, *names: str) -> None:
        """Skip the test, with the reason, where one of these capabilities is closed."""
        for name in names:
            value = getattr(self.capabilities, name)
            if isinstance(value, Closed):
                pytest.skip(f"{name} is closed: {value.reason}")

    @property
    def any_family(self) -> str:
        """The first family that is open, for what does not depend on it."""
        return next(name for name in GRAPHS if getattr(self.capabilities, name) is OPEN)

    def folder(self, family: str) -> Path:
        """The family's model folder."""
        folder = self.root / family
        return folder if folder.exists() else tiny.write_model(folder, family, seed=GRAPHS.index(family))

    def plan(self, family: str, **fields: Any) -> ExecutionPlan:
        """A plan on the device under test; in float32 unless told otherwise."""
        given = {"device": self.capabilities.device, "dtype": "float32"} | fields
        return tiny.plan_for(self.backend, self.folder(family), **given)

    def open(self, family: str, **fields: Any) -> Any:
        """A session of its own, as ``mens_open`` gives it."""
        return self.backend.open(self.plan(family, **fields), tiny.SHAPE)

    def session(self, family: str, **fields: Any) -> Any:
        """A session with a zero adapter and fresh moments; the one that is open already, if there is one."""
        key = (family, *sorted(fields.items()))
        if key not in self._opened:
            session = self.open(family, **fields)
            self._opened[key] = session, self.backend.state(session)
        session, start = self._opened[key]
        # The core goes on with what restoring gives back, so do the tests.
        self._opened[key] = self.backend.restore(session, start), start
        return self._opened[key][0]

    def adapted(self, family: str, **fields: Any) -> tuple[Any, Adapter]:
        """A session whose adapter holds random numbers, and those numbers."""
        session = self.session(family, **fields)
        adapter = tiny.random_adapter(self.backend.state(session).adapter)
        return self.backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0)), adapter


@pytest.fixture(scope="module")
def workbench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """The backend that the module's ``Capabilities`` name."""
    declared = getattr(request.module, "Capabilities", None)
    problems = declaration_problems(declared)
    if problems or declared is None:
        pytest.fail("Capabilities:\n" + "\n".join(f"  - {problem}" for problem in problems), pytrace=False)
    return Workbench(
        backend=load_backend(declared.backend), capabilities=declared, root=tmp_path_factory.mktemp("conformance")
    )


@pytest.fixture(params=GRAPHS)
def family(request: pytest.FixtureRequest, workbench: Workbench) -> str:
    """Each family that is open, in turn."""
    workbench.needs(request.param)
    return str(request.param)


def arrays_of(value: Any) -> Iterator[NDArray[Any]]:
    """The arrays in a batch, a window, a state or a mapping."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        yield from (array for part in value.values() for array in arrays_of(part))
    elif isinstance(value, list | tuple):
        yield from (array for part in value for array in arrays_of(part))
    elif isinstance(value, Batch | TrainingState):
        yield from arrays_of([getattr(value, field.name) for field in attrs.fields(type(value))])


@contextmanager
def untouched(*values: Any) -> Iterator[list[bool]]:
    """Gives a list to which, afterwards, it is added whether every array is as it was."""
    arrays = list(arrays_of(values))
    before = [array.tobytes() for array in arrays]
    verdict: list[bool] = []
    yield verdict
    verdict.append(before == [array.tobytes() for array in arrays])


def same_state(left: TrainingState, right: TrainingState) -> bool:
    """Bit for bit."""
    return left.step == right.step and all(
        set(one) == set(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)
        for one, other in ((left.adapter, right.adapter), (left.optimizer, right.optimizer))
    )


def random_state(adapter: Mapping[str, NDArray[np.float32]], step: int = 7) -> TrainingState:
    """An adapter and moments that could have come out of training."""
    values = tiny.random_adapter(adapter, seed=1)
    moments = {f"{name}.{moment}": array for name, array in values.items() for moment in ("exp_avg", "exp_avg_sq")}
    optimizer = {name: np.abs(array) for name, array in tiny.random_adapter(moments, seed=2).items()}
    return TrainingState(adapter=values, optimizer=optimizer, step=step)
