"""A loaded backend: one typed method per hook.

The core never touches ``manager.hook``. Each method checks what came back, so that a plugin's mistake is
reported at the call, with the plugin's name and version, and not three modules later. Checked here is what costs
next to nothing beside the hook: types, shapes, number formats, finite values, counts, whether an array that was
handed out before is handed out again. Weights and states go in as read-only views, so that writing into them fails
there and then. What would cost a copy or a second computation (a batch that was changed, a base that moved, a copy
that lives on) is left to ``mens_core.testing.conformance``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import attrs
import numpy as np
import pluggy
from numpy.typing import NDArray

from mens_core.contract import FineTuneContract
from mens_core.errors import HookContractError
from mens_core.exchange import Batch, BatchShape, GenerateSettings, NF4Spec, QuantizedWeight, StepMetrics, TrainingState
from mens_core.hf.layout import Layout
from mens_core.plan import MEMORY_PARTS, BaseWeights, ExecutionPlan, GateVerdict, KernelOffer, Machine, Workload

__all__ = ["Backend"]

_Answer = TypeVar("_Answer")
_DTYPES = ("float32", "bfloat16")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NESTED_BLOCK = 256  # scales that share one scale of their own


@attrs.frozen(kw_only=True)
class Backend:
    """One backend with the observers and gates registered beside it.

    Every method raises ``HookContractError`` if the hook is not implemented or its answer breaks the
    specification in ``mens_core.hookspecs``, where arguments and answers are described.

    Attributes:
        name: as ``--backend`` takes it.
        plugin: distribution and version.
        manager: pluggy's; for this class only.
    """

    name: str
    plugin: str
    manager: pluggy.PluginManager
    # Where an array of a state that somebody still holds begins → that array.
    _handed_out: weakref.WeakValueDictionary[int, NDArray[np.float32]] = attrs.field(
        factory=weakref.WeakValueDictionary, init=False, repr=False, eq=False
    )

    def plan(
        self,
        contract: FineTuneContract,
        layout: Layout,
        machine: Machine,
        weights: BaseWeights,
        workload: Workload | None,
    ) -> KernelOffer:
        """``mens_plan``."""
        offer = self._call(
            "mens_plan",
            KernelOffer,
            contract=contract,
            layout=layout,
            machine=machine,
            weights=weights,
            workload=workload,
        )
        expected = f"{self.name}_{contract.adapter.method}"
        if offer.kernel != expected:
            self._broken("mens_plan", f"offers kernel {offer.kernel!r}, expected {expected!r}")
        if offer.feasible and not (offer.device and offer.dtype in _DTYPES):
            self._broken("mens_plan", f"a feasible offer must name its device and a dtype out of {', '.join(_DTYPES)}")
        if not offer.feasible and not offer.reason:
            self._broken("mens_plan", "an offer that is not feasible must give its reason")
        for part, size in offer.memory.items():
            if part not in MEMORY_PARTS or not isinstance(size, int) or size < 0:
                self._broken("mens_plan", f"memory part {part!r} of {size} bytes, expected {', '.join(MEMORY_PARTS)}")
        seconds = offer.seconds_per_step
        if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
            self._broken("mens_plan", f"{seconds!r} seconds a step, expected a positive number")
        if offer.feasible and contract.adapter.has_patterns and not offer.patterns:
            # A backend that does not know of patterns would train with other ranks and scales than asked for.
            reason = f"{self.plugin} does not say that it gives layers ranks and scales of their own"
            return KernelOffer(kernel=offer.kernel, feasible=False, reason=f"{reason}; leave the patterns out")
        if offer.feasible and contract.adapter.modules_to_save and not offer.modules_to_save:
            # Such a backend would leave them frozen.
            reason = f"{self.plugin} does not say that it trains modules whole; leave modules_to_save out"
            return KernelOffer(kernel=offer.kernel, feasible=False, reason=reason)
        return offer

    def gates(self, contract: FineTuneContract, plan: ExecutionPlan) -> tuple[GateVerdict, ...]:
        """``mens_gates``, all answers in one."""
        verdicts = [
            verdict for answer in self.manager.hook.mens_gates(contract=contract, plan=plan) for verdict in answer or ()
        ]
        if not all(isinstance(verdict, GateVerdict) for verdict in verdicts):
            self._broken("mens_gates", "expected GateVerdict records")
        return tuple(verdicts)

    def quantize(self, weight: NDArray[np.float32], spec: NF4Spec) -> QuantizedWeight:
        """``mens_quantize``."""
        quantized = self._call("mens_quantize", QuantizedWeight, weight=_view(weight), spec=spec)
        blocks = -(-weight.size // spec.block_size)
        self._array("mens_quantize", quantized.codes, (-(-weight.size // 2),), np.uint8)
        self._array("mens_quantize", quantized.absmax, (blocks,), np.uint8 if spec.double_quant else np.float32)
        if spec.double_quant:
            self._array("mens_quantize", quantized.nested_absmax, (-(-blocks // _NESTED_BLOCK),), np.float32)
        elif quantized.nested_absmax is not None:
            self._broken("mens_quantize", "answered nested_absmax where scales are not quantised")
        if quantized.shape != weight.shape or quantized.spec != spec:
            found, asked = f"{quantized.shape} as {quantized.spec}", f"{weight.shape} as {spec}"
            self._broken("mens_quantize", f"answered {found}, expected {asked}")
        if not math.isfinite(quantized.offset):
            self._broken("mens_quantize", f"offset {quantized.offset} is not finite")
        return quantized

    def dequantize(self, quantized: QuantizedWeight) -> NDArray[np.float32]:
        """``mens_dequantize``."""
        nested = None if quantized.nested_absmax is None else _view(quantized.nested_absmax)
        given = attrs.evolve(
            quantized, codes=_view(quantized.codes), absmax=_view(quantized.absmax), nested_absmax=nested
        )
        weight = self._call("mens_dequantize", np.ndarray, quantized=given)
        return self._array("mens_dequantize", weight, quantized.shape, np.float32)

    def open(self, plan: ExecutionPlan, shape: BatchShape) -> Any:
        """``mens_open``."""
        return self._call("mens_open", object, plan=plan, shape=shape)

    def forward(self, session: Any, batch: Batch) -> NDArray[np.float32]:
        """``mens_forward``."""
        logits = self._call("mens_forward", np.ndarray, session=session, batch=batch)
        if logits.ndim != 2 or logits.shape[1] <= batch.input_ids.max():
            self._broken("mens_forward", f"shape {logits.shape}, expected (tokens, vocabulary)")
        return self._array("mens_forward", logits, (len(batch.input_ids), logits.shape[1]), np.float32)

    def loss(self, session: Any, batch: Batch) -> tuple[float, int]:
        """``mens_loss``."""
        answer = self._call("mens_loss", tuple, session=session, batch=batch)
        if len(answer) != 2 or not _is_whole(answer[1]) or not 0 <= float(answer[0]) < math.inf:
            self._broken("mens_loss", f"answered {answer!r}, expected a finite sum of at least 0 and a count")
        total, count = float(answer[0]), int(answer[1])
        if count != batch.supervised_tokens:
            self._broken("mens_loss", f"counted {count} supervised tokens, expected {batch.supervised_tokens}")
        return total, count

    def step(self, session: Any, window: Sequence[Batch], learning_rate: float) -> StepMetrics:
        """``mens_step``; the metrics are left unread."""
        metrics = self._call("mens_step", StepMetrics, session=session, window=window, learning_rate=learning_rate)
        expected = sum(batch.supervised_tokens for batch in window)
        if metrics.supervised_tokens != expected:
            self._broken("mens_step", f"counted {metrics.supervised_tokens} supervised tokens, expected {expected}")
        for name in ("loss_sum", "grad_norm"):
            if not hasattr(getattr(metrics, name), "__float__"):
                self._broken("mens_step", f"{name} is a {type(getattr(metrics, name)).__name__}, which is no number")
        return metrics

    def state(self, session: Any) -> TrainingState:
        """``mens_state``."""
        state = self._call("mens_state", TrainingState, session=session)
        for name, tensor in state.adapter.items():
            if not name.endswith((".weight", ".bias")):
                self._broken("mens_state", f"tensor {name!r} is neither of a pair nor one of the base's")
            self._array(f"mens_state ({name})", tensor, np.shape(tensor), np.float32)
        self._pairs(state)
        moments = {f"{name}.{moment}": tensor.shape for name, tensor in state.adapter.items() for moment in _MOMENTS}
        if state.optimizer and set(state.optimizer) != set(moments):
            wrong = min(set(state.optimizer) ^ set(moments))
            self._broken("mens_state", f"moment {wrong!r} is left over or missing")
        for name, tensor in state.optimizer.items():
            self._array(f"mens_state ({name})", tensor, moments[name], np.float32)
        if not _is_whole(state.step) or state.step < 0:
            self._broken("mens_state", f"step is {state.step!r}, expected the number of steps taken")
        self._copies(state)
        return state

    def restore(self, session: Any, state: TrainingState) -> Any:
        """``mens_restore``."""
        given = attrs.evolve(state, adapter=_views(state.adapter), optimizer=_views(state.optimizer))
        return self._call("mens_restore", object, session=session, state=given)

    def generate(
        self,
        session: Any,
        prompt: Sequence[int],
        settings: GenerateSettings,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """``mens_generate``."""
        told: list[int] = []

        def listen(token: int) -> None:
            told.append(int(token))
            if on_token is not None:
                on_token(int(token))

        given = listen if on_token is not None else None
        answer = self._call("mens_generate", list, session=session, prompt=prompt, settings=settings, on_token=given)
        if not all(_is_whole(token) and token >= 0 for token in answer):
            self._broken("mens_generate", f"answered {answer!r}, expected token ids")
        tokens = [int(token) for token in answer]
        if len(tokens) > settings.max_new_tokens:
            self._broken(
                "mens_generate", f"gave {len(tokens)} tokens, at most {settings.max_new_tokens} were asked for"
            )
        if set(tokens[:-1]) & set(settings.stop_tokens):
            self._broken("mens_generate", "went on after a stop token")
        if told and told != tokens:
            self._broken("mens_generate", f"told of the tokens {told} and answered {tokens}")
        if on_token is not None and not told:
            for token in tokens:
                on_token(token)
        return tokens

    def merge(
        self, weight: NDArray[np.float32], lora_a: NDArray[np.float32], lora_b: NDArray[np.float32], scale: float
    ) -> NDArray[np.float32]:
        """``mens_merge``."""
        merged = self._call(
            "mens_merge", np.ndarray, weight=_view(weight), lora_a=_view(lora_a), lora_b=_view(lora_b), scale=scale
        )
        if np.may_share_memory(merged, weight):
            self._broken("mens_merge", "answered memory that it was given, expected a new array")
        return self._array("mens_merge", merged, weight.shape, np.float32)

    def event(self, event: Mapping[str, Any]) -> None:
        """``mens_event``, to every observer."""
        self.manager.hook.mens_event(event=event)

    def _call(self, hook: str, kind: type[_Answer], **arguments: Any) -> _Answer:
        try:
            answer = getattr(self.manager.hook, hook)(**arguments)
        except ValueError as error:
            # NumPy's words where somebody writes into a view that was handed in.
            if "read-only" not in str(error):
                raise
            raise self._error(hook, f"changed what it was given: {error}") from error
        if answer is None:
            self._broken(hook, "is not implemented or answered None")
        if not isinstance(answer, kind):
            self._broken(hook, f"answered a {type(answer).__name__}, expected {kind.__name__}")
        return answer

    def _array(self, hook: str, array: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            self._broken(hook, f"answered {found}, expected {np.dtype(dtype)} {shape}")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            self._broken(hook, "answered values that are not finite")
        return array

    def _pairs(self, state: TrainingState) -> None:
        """Every A has its B, and they share a rank."""
        for path in {name.rpartition(".lora_")[0] for name in state.adapter if ".lora_" in name}:
            pair = [state.adapter.get(f"{path}.lora_{letter}.weight") for letter in "AB"]
            a, b = (() if tensor is None else tensor.shape for tensor in pair)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                self._broken("mens_state", f"{path}: lora_A {a} and lora_B {b}, expected (rank, in) and (out, rank)")

    def _copies(self, state: TrainingState) -> None:
        """No array lies where one lies that was handed out before and is still held."""
        tensors = {**state.adapter, **state.optimizer}
        places = {name: tensor.__array_interface__["data"][0] for name, tensor in tensors.items() if tensor.size}
        for name, place in places.items():
            if place in self._handed_out:
                self._broken("mens_state", f"{name} is an array that was handed out before, expected a copy")
        for name, place in places.items():
            self._handed_out[place] = tensors[name]

    def _broken(self, hook: str, problem: str) -> NoReturn:
        raise self._error(hook, problem)

    def _error(self, hook: str, problem: str) -> HookContractError:
        return HookContractError(
            f"{hook}: {problem}",
            where=f"backend {self.name!r} of {self.plugin}",
            expected=f"as {hook} in mens_core/hookspecs.py says; see docs/writing_a_backend.md",
        )


def _view(array: NDArray[Any]) -> NDArray[Any]:
    """The array, not to be written into."""
    view = array.view()
    view.flags.writeable = False
    return view


def _views(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: _view(array) for name, array in arrays.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
