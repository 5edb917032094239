"""A wrong answer of a hook is an error at the call, which names the hook, the plugin and its version."""

import attrs
import numpy as np
import pluggy
import pytest

from mens_core import hookimpl, hookspecs
from mens_core.backend import Backend
from mens_core.errors import HookContractError
from mens_core.exchange import GenerateSettings, NF4Spec, QuantizedWeight, StepMetrics, TrainingState
from mens_core.testing import tiny

BATCH = tiny.batch_of(5, 3)
A, B = "layer.lora_A.weight", "layer.lora_B.weight"
WEIGHT = np.ones((4, 64), np.float32)
SETTINGS = GenerateSettings(max_new_tokens=3, stop_tokens=(9,))


def _backend(hook, answer):
    """A backend whose one hook gives this answer, or what it returns."""
    manager = pluggy.PluginManager("mens_core")
    manager.add_hookspecs(hookspecs)
    arguments = getattr(hookspecs, hook).__code__.co_varnames[: getattr(hookspecs, hook).__code__.co_argcount]
    source = f"def {hook}({', '.join(arguments)}): return answer({', '.join(arguments)})"
    space = {"answer": answer if callable(answer) else lambda *_: answer}
    exec(source, space)  # noqa: S102 - pluggy reads the arguments' names
    manager.register(type("Plugin", (), {hook: staticmethod(hookimpl(space[hook]))})())
    return Backend(name="mine", plugin="mens-mine 3.1", manager=manager)


def _state(**changes):
    adapter = {A: np.zeros((2, 6), np.float32), B: np.zeros((5, 2), np.float32)}
    moments = {
        f"{name}.{m}": np.zeros_like(array) for name, array in adapter.items() for m in ("exp_avg", "exp_avg_sq")
    }
    return attrs.evolve(TrainingState(adapter=adapter, optimizer=moments, step=1), **changes)


def _quantized(**changes):
    parts = {
        "codes": np.zeros(128, np.uint8),
        "absmax": np.zeros(4, np.uint8),
        "nested_absmax": np.zeros(1, np.float32),
    }
    return QuantizedWeight(**({**parts, "offset": 0.0, "shape": (4, 64), "spec": NF4Spec()} | changes))


def _metrics(**changes):
    count = BATCH.supervised_tokens
    return StepMetrics(**({"loss_sum": 1.0, "grad_norm": np.float32(1), "supervised_tokens": count} | changes))


LOGITS = np.zeros((8, tiny.VOCABULARY), np.float32)
CALLS = {
    "mens_forward": lambda backend: backend.forward(None, BATCH),
    "mens_loss": lambda backend: backend.loss(None, BATCH),
    "mens_step": lambda backend: backend.step(None, [BATCH], 0.1),
    "mens_state": lambda backend: backend.state(None),
    "mens_restore": lambda backend: backend.restore(None, _state()),
    "mens_generate": lambda backend: backend.generate(None, [3], SETTINGS),
    "mens_quantize": lambda backend: backend.quantize(WEIGHT, NF4Spec()),
    "mens_dequantize": lambda backend: backend.dequantize(_quantized()),
    "mens_merge": lambda backend: backend.merge(WEIGHT, WEIGHT[:2], WEIGHT[:, :2], 1.0),
}
RIGHT = {
    "mens_forward": LOGITS,
    "mens_loss": (1.5, BATCH.supervised_tokens),
    "mens_step": _metrics(),
    "mens_state": _state(),
    "mens_restore": object(),
    "mens_generate": [3, np.int64(9)],
    "mens_quantize": _quantized(),
    "mens_dequantize": WEIGHT,
    "mens_merge": 2 * WEIGHT,
}
WRONG = [
    ("mens_forward", LOGITS[:-1], "answered float32 (7, 97)"),
    ("mens_forward", LOGITS.astype(np.float64), "answered float64"),
    ("mens_forward", LOGITS[:, :3], "expected (tokens, vocabulary)"),
    ("mens_forward", LOGITS.tolist(), "answered a list"),
    ("mens_forward", np.full_like(LOGITS, np.nan), "not finite"),
    ("mens_forward", None, "is not implemented or answered None"),
    ("mens_loss", (float("nan"), BATCH.supervised_tokens), "expected a finite sum"),
    ("mens_loss", (-1.0, BATCH.supervised_tokens), "at least 0"),
    ("mens_loss", (1.0, float(BATCH.supervised_tokens)), "and a count"),
    ("mens_loss", (1.0, 0), "counted 0 supervised tokens"),
    ("mens_step", _metrics(supervised_tokens=77), "counted 77 supervised tokens"),
    ("mens_step", _metrics(loss_sum="much"), "loss_sum is a str, which is no number"),
    ("mens_state", _state(adapter={A: np.zeros((2, 6), np.float32)}), "layer: lora_A (2, 6) and lora_B ()"),
    ("mens_state", _state(adapter={**_state().adapter, B: np.zeros((5, 3), np.float32)}), "and lora_B (5, 3)"),
    ("mens_state", _state(adapter={**_state().adapter, A: np.zeros((2, 6))}), "answered float64 (2, 6)"),
    ("mens_state", _state(adapter={**_state().adapter, "x": WEIGHT}), "neither of a pair nor one of the base's"),
    ("mens_state", _state(optimizer={f"{A}.exp_avg": np.zeros((2, 6), np.float32)}), "left over or missing"),
    ("mens_state", _state(optimizer={**_state().optimizer, f"{A}.exp_avg": WEIGHT}), "expected float32 (2, 6)"),
    ("mens_state", _state(step=-1), "step is -1"),
    ("mens_state", _state(step=1.0), "step is 1.0"),
    ("mens_restore", None, "answered None"),
    ("mens_generate", [1, 2, 3, 4], "at most 3 were asked for"),
    ("mens_generate", [9, 1], "went on after a stop token"),
    ("mens_generate", [1.5], "expected token ids"),
    ("mens_generate", [-1], "expected token ids"),
    ("mens_quantize", _quantized(codes=np.zeros(127, np.uint8)), "answered uint8 (127,)"),
    ("mens_quantize", _quantized(absmax=np.zeros(4, np.float32)), "answered float32 (4,)"),
    ("mens_quantize", _quantized(nested_absmax=None), "answered NoneType"),
    ("mens_quantize", _quantized(offset=float("inf")), "offset inf"),
    ("mens_quantize", _quantized(spec=NF4Spec(block_size=128)), "block_size=128"),
    ("mens_dequantize", WEIGHT.T, "answered float32 (64, 4)"),
    ("mens_merge", np.ones((1, 64), np.float32), "answered float32 (1, 64)"),
    ("mens_merge", lambda weight, *_: weight, "answered memory that it was given"),
]


@pytest.mark.parametrize("hook", RIGHT)
def test_a_right_answer_passes(hook):
    CALLS[hook](_backend(hook, RIGHT[hook]))


@pytest.mark.parametrize(("hook", "answer", "words"), WRONG, ids=[f"{hook}-{words}" for hook, _, words in WRONG])
def test_a_wrong_answer_names_hook_plugin_and_version(hook, answer, words):
    with pytest.raises(HookContractError) as caught:
        CALLS[hook](_backend(hook, answer))
    text = str(caught.value)
    assert text.startswith(f"{hook}")
    assert words in text
    assert "backend 'mine' of mens-mine 3.1" in text


def _double(array):
    array *= 2
    return array


@pytest.mark.parametrize(
    ("hook", "writes"),
    [
        ("mens_merge", lambda weight, *_: _double(weight)),
        ("mens_quantize", lambda weight, _: _double(weight)),
        ("mens_dequantize", lambda quantized: _double(quantized.codes)),
        ("mens_restore", lambda _, state: _double(state.adapter[A])),
    ],
)
def test_writing_into_what_was_given_is_an_error_and_changes_nothing(hook, writes):
    with pytest.raises(HookContractError, match=f"{hook}: changed what it was given"):
        CALLS[hook](_backend(hook, writes))
    assert (WEIGHT == 1).all()


def test_an_error_of_the_plugins_own_passes_as_it_is():
    def fail(*_):
        raise ValueError("of my own")

    with pytest.raises(ValueError, match="of my own"):
        CALLS["mens_merge"](_backend("mens_merge", fail))


def test_an_array_that_is_handed_out_twice_is_told_while_the_first_is_held():
    live = _state()
    backend = _backend("mens_state", live)
    held = backend.state(None)
    with pytest.raises(HookContractError, match="handed out before"):
        backend.state(None)
    assert held is live
    copies = _backend("mens_state", lambda _: _state())
    states = [copies.state(None) for _ in range(3)]
    assert len(states) == 3
