"""One optimizer step: PEFT's gradients, torch's clipping and AdamW, and a window whose cut does not matter."""

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances

from mens_core.errors import DataError
from mens_core.exchange import IGNORE, TrainingState

RATE = 1e-2
UNBOUNDED = 1e9  # a norm that is never reached


def _gradients(state):
    """The gradient after clipping, out of the first moments of the first step."""
    return {
        name.removesuffix(".exp_avg"): array / 0.1
        for name, array in state.optimizer.items()
        if name.endswith(".exp_avg")
    }


def _norm(arrays):
    return np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values()))


def _relative(found, expected):
    """Largest relative difference of one tensor, in the Frobenius norm."""
    assert set(found) == set(expected)
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected)


@pytest.fixture
def window():
    return [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]


def _peft(folder, adapter, windows, *, max_grad_norm, change=None, rate=RATE, **settings):
    """Norms, first moments and parameters after steps of PEFT's model with torch's clipping and AdamW."""
    model = references.open_model(folder)
    model = references.with_weights(model, change) if change else model
    model, parameters = references.with_adapter(model, adapter, rank=4, alpha=8.0)
    rates = [rate] * len(windows)
    norms, optimizer = references.train(
        model, parameters, windows, rates=rates, max_grad_norm=max_grad_norm, **settings
    )
    moments = {name: optimizer.state[parameter]["exp_avg"].numpy() for name, parameter in parameters.items()}
    trained = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    return norms, moments, trained


@pytest.mark.parametrize("max_grad_norm", [UNBOUNDED, 0.5])
def test_gradients_are_those_of_peft(backend, adapted, folders, family, window, max_grad_norm):
    session, adapter = adapted(family, max_grad_norm=max_grad_norm)
    metrics = backend.step(session, window, RATE)
    norms, moments, _ = _peft(folders[family], adapter, [window], max_grad_norm=max_grad_norm)
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=tolerances.GRADIENT)
    expected = {name: moment / 0.1 for name, moment in moments.items()}
    assert _relative(_gradients(backend.state(session)), expected) <= tolerances.GRADIENT


def test_a_wrong_gradient_would_show(backend, adapted, folders, family, window):
    session, adapter = adapted(family, max_grad_norm=UNBOUNDED)
    backend.step(session, window, RATE)
    nudged = {name: array * np.float32(1 + 1e-4) for name, array in adapter.items()}
    _, moments, _ = _peft(folders[family], nudged, [window], max_grad_norm=UNBOUNDED)
    expected = {name: moment / 0.1 for name, moment in moments.items()}
    assert _relative(_gradients(backend.state(session)), expected) > tolerances.GRADIENT


def test_qlora_gradients_are_those_of_peft_on_the_dequantised_base(backend, adapted, folders, family, window):
    session, adapter = adapted(family, method="qlora", max_grad_norm=UNBOUNDED)
    spec = tiny.nf4_spec()
    metrics = backend.step(session, window, RATE)
    norms, moments, _ = _peft(
        folders[family],
        adapter,
        [window],
        max_grad_norm=UNBOUNDED,
        change=lambda _, weight: backend.dequantize(backend.quantize(weight, spec)),
    )
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=tolerances.GRADIENT)
    expected = {name: moment / 0.1 for name, moment in moments.items()}
    assert _relative(_gradients(backend.state(session)), expected) <= tolerances.GRADIENT


def test_the_metrics_are_the_loss_and_the_norm_before_clipping(backend, adapted, family, window):
    session, _ = adapted(family, max_grad_norm=0.5)
    losses = [backend.loss(session, batch) for batch in window]
    metrics = backend.step(session, window, RATE)
    assert metrics.supervised_tokens == sum(count for _, count in losses)
    assert float(metrics.loss_sum) == pytest.approx(sum(total for total, _ in losses), rel=tolerances.LOSS)
    assert float(metrics.grad_norm) > 0.5


def test_clipping_really_clips(backend, adapted, family, window):
    session, _ = adapted(family, max_grad_norm=0.5)
    backend.step(session, window, RATE)
    assert _norm(_gradients(backend.state(session))) == pytest.approx(0.5, rel=tolerances.GRADIENT)


def test_a_small_gradient_is_not_scaled_up(backend, adapted, family, window):
    session, _ = adapted(family, max_grad_norm=UNBOUNDED)
    metrics = backend.step(session, window, RATE)
    assert _norm(_gradients(backend.state(session))) == pytest.approx(float(metrics.grad_norm), rel=tolerances.GRADIENT)


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_the_cut_of_a_window_does_not_matter(backend, adapted, family, cut):
    rows = [
        tiny.batch_of(length, seed=length, supervised=share)
        for length, share in zip([9, 3, 12, 5, 2, 7, 4, 11], [0.9, 0.2, 0.5, 1, 1, 0.1, 0.8, 0.3], strict=True)
    ]
    size = len(rows) // cut
    batches = [tiny.packed(rows[start : start + size]) for start in range(0, len(rows), size)]
    found = []
    for window in (rows, batches):
        session, _ = adapted(family, max_grad_norm=UNBOUNDED)
        metrics = backend.step(session, window, RATE)
        found.append((float(metrics.loss_sum), float(metrics.grad_norm), _gradients(backend.state(session))))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=tolerances.ACCUMULATION)
    assert _relative(found[0][2], found[1][2]) <= tolerances.ACCUMULATION


def test_a_mean_of_the_batches_means_would_show(backend, adapted, family, window):
    session, _ = adapted(family, max_grad_norm=UNBOUNDED)
    backend.step(session, window, RATE)
    whole = _gradients(backend.state(session))
    parts = []
    for batch in window:
        session, _ = adapted(family, max_grad_norm=UNBOUNDED)
        backend.step(session, [batch], RATE)
        parts.append(_gradients(backend.state(session)))
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    assert _relative(mean, whole) > tolerances.ACCUMULATION


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_adamw(backend, adapted, family, window, weight_decay):
    session, before = adapted(family, max_grad_norm=0.5, weight_decay=weight_decay)
    for count, rate in enumerate([RATE, RATE / 3], start=1):
        start = backend.state(session)
        backend.step(session, window, rate)
        end = backend.state(session)
        assert end.step == count
        for name in before:
            first, second = (
                end.optimizer[f"{name}.{moment}"].astype(np.float64) for moment in ("exp_avg", "exp_avg_sq")
            )
            step = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            expected = start.adapter[name] * (1 - rate * weight_decay) - rate * step
            assert np.abs(end.adapter[name] - expected).max() <= tolerances.ADAMW * rate


def test_a_run_is_that_of_peft_under_adamw(backend, adapted, folders, family):
    windows = [[tiny.batch_of(9, 5, seed=seed), tiny.batch_of(7, seed=seed + 10)] for seed in range(4)]
    session, adapter = adapted(family, weight_decay=0.1)
    for window in windows:
        backend.step(session, window, RATE)
    _, _, expected = _peft(folders[family], adapter, windows, max_grad_norm=1.0, weight_decay=0.1)
    found = backend.state(session).adapter
    moved = _norm({name: expected[name] - adapter[name] for name in adapter})
    assert _norm({name: found[name] - expected[name] for name in adapter}) <= tolerances.TRAJECTORY * moved


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.11}, {"rate": RATE * 1.001}])
def test_a_run_with_another_setting_would_show(backend, adapted, folders, family, wrong):
    windows = [[tiny.batch_of(9, 5, seed=seed)] for seed in range(4)]
    session, adapter = adapted(family, weight_decay=0.1)
    for window in windows:
        backend.step(session, window, RATE)
    _, _, expected = _peft(folders[family], adapter, windows, **{"max_grad_norm": 1.0, "weight_decay": 0.1} | wrong)
    found = backend.state(session).adapter
    moved = _norm({name: expected[name] - adapter[name] for name in adapter})
    assert _norm({name: found[name] - expected[name] for name in adapter}) > tolerances.TRAJECTORY * moved


def test_rate_zero_moves_the_moments_only(backend, adapted, family, window):
    session, adapter = adapted(family)
    backend.step(session, window, 0.0)
    state = backend.state(session)
    for name, array in adapter.items():
        np.testing.assert_array_equal(state.adapter[name], array)
        assert state.optimizer[f"{name}.exp_avg"].any()


def test_something_is_learned(backend, session_of, family, window):
    session = session_of(family)
    start = backend.state(session)
    halves = {name: array * (".lora_A." in name) for name, array in tiny.random_adapter(start.adapter).items()}
    session = backend.restore(session, TrainingState(adapter=halves, optimizer={}, step=0))
    before = backend.loss(session, window[0])[0]
    for _ in range(10):
        backend.step(session, window, RATE)
    assert backend.loss(session, window[0])[0] < 0.8 * before


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_never_changes(backend, session_of, family, window, method):
    session = session_of(family, method=method)
    before = backend.forward(session, window[0])
    start = backend.state(session)
    adapter = tiny.random_adapter(start.adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    for _ in range(3):
        backend.step(session, window, RATE)
    session = backend.restore(session, start)
    np.testing.assert_array_equal(backend.forward(session, window[0]), before)


def test_a_step_that_is_not_finite_changes_nothing(backend, adapted, family, window):
    session, adapter = adapted(family)
    backend.step(session, window, RATE)
    huge = {name: array * np.float32(1e20) for name, array in adapter.items()}
    session = backend.restore(session, attrs.evolve(backend.state(session), adapter=huge))
    before = backend.state(session)
    metrics = backend.step(session, window, RATE)
    assert not np.isfinite([float(metrics.loss_sum), float(metrics.grad_norm)]).all()
    after = backend.state(session)
    assert after.step == before.step == 1
    for kind in ("adapter", "optimizer"):
        for name, array in getattr(before, kind).items():
            np.testing.assert_array_equal(getattr(after, kind)[name], array)


def test_a_step_after_one_that_was_not_finite_is_as_good_as_any(backend, adapted, family, window):
    found = []
    for size in (1e20, 1):
        session, adapter = adapted(family)
        if size > 1:
            huge = {name: array * np.float32(size) for name, array in adapter.items()}
            backend.step(backend.restore(session, attrs.evolve(backend.state(session), adapter=huge)), window, RATE)
        session, _ = adapted(family)
        backend.step(session, window, RATE)
        found.append(backend.state(session).adapter)
    for name, array in found[1].items():
        np.testing.assert_array_equal(found[0][name], array)


def test_a_batch_without_targets_adds_nothing(backend, adapted, family, window):
    silent = attrs.evolve(window[0], targets=np.full_like(window[0].targets, IGNORE))
    found = []
    for batches in ([window[1]], [silent, window[1]]):
        session, _ = adapted(family)
        metrics = backend.step(session, batches, RATE)
        found.append((float(metrics.loss_sum), float(metrics.grad_norm), metrics.supervised_tokens))
    assert found[0] == pytest.approx(found[1], rel=tolerances.ACCUMULATION)


def test_a_window_without_targets_is_refused(backend, session_of, family, window):
    silent = attrs.evolve(window[0], targets=np.full_like(window[0].targets, IGNORE))
    with pytest.raises(DataError, match="no supervised token"):
        backend.step(session_of(family), [silent], RATE)
