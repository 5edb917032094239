"""Torch and JAX side by side, and a run of many steps, in which small differences would add up."""

import numpy as np
import pytest
import references
import tiny
import tolerances
import torch

from mens_core.exchange import TrainingState
from mens_core.parity.bounds import GRADIENT
from mens_core.parity.comparison import tensors_apart
from mens_core.parity.graph import compare_graphs
from mens_core.parity.learning import UNBOUNDED, compare_gradients, compare_runs, compare_updates
from mens_core.parity.material import Material, adapter_like
from mens_core.parity.storage import compare_storage
from mens_core.parity.witness import BackendWitness
from mens_core.plugins import load_backend
from mens_core.training.schedule import learning_rate

RATE, STEPS, PEFT_STEPS = 2e-3, 100, 50
FAMILY = "llama"
RUN = {"weight_decay": 0.1, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def backends():
    return [load_backend(name) for name in ("torch", "jax")]


@pytest.fixture(scope="module")
def open_both(backends, folders):
    """Torch and JAX on a family with the given fields."""

    def open_witnesses(family, **fields):
        return [
            BackendWitness.open(tiny.plan_for(backend, folders[family], **fields), backend, tiny.SHAPE)
            for backend in backends
        ]

    return open_witnesses


def _windows():
    batches = [tiny.batch_of(9, 5, 12, seed=seed) for seed in range(4)]
    return [[batches[step % 4], batches[(step + 1) % 4]] for step in range(STEPS)]


def _rates(steps=STEPS):
    return [
        learning_rate(step, schedule="cosine", peak=RATE, warmup_steps=10, total_steps=STEPS) for step in range(steps)
    ]


@pytest.fixture(scope="module")
def start(open_both):
    """A as a run starts, B small instead of zero, so that every gradient is there from the first step."""
    return TrainingState(adapter=adapter_like(open_both(FAMILY, **RUN)[0].empty_adapter), optimizer={}, step=0)


@pytest.fixture(scope="module")
def runs(open_both, start):
    """The run on both backends."""
    return [witness.steps(start, _windows(), _rates()) for witness in open_both(FAMILY, **RUN)]


def _losses(run):
    return np.array([step.loss for step in run])


def _moved(adapter, start):
    """The length of the way from the start."""
    return np.sqrt(sum(np.square(adapter[name].astype(np.float64) - array).sum() for name, array in start.items()))


def _passed(comparisons):
    return {found.what: found.passed for found in comparisons}


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_torch_and_jax_agree_on_graph_gradients_and_a_short_run(open_both, family):
    left, right = open_both(family, max_grad_norm=UNBOUNDED)
    material, adapter = Material.of(left.plan.layout), adapter_like(left.empty_adapter)
    found = [*compare_graphs(left, right, adapter, material, 2), *compare_gradients(left, right, adapter, material, 2)]
    found += [*compare_runs(left, right, adapter, material)]
    clipping = open_both(family, max_grad_norm=0.5, weight_decay=0.1)
    found += [*compare_updates(*clipping, adapter, material)]
    assert all(comparison.passed for comparison in found), _passed(found)
    nudged = {name: array * np.float32(1 + 1e-4) for name, array in adapter.items()}
    other = BackendWitness.logits(left, nudged, material.batch)
    assert np.abs(other - right.logits(adapter, material.batch)).max() > tolerances.LOGITS


def test_torch_and_jax_agree_on_what_is_trained_whole(open_both):
    whole = ("lm_head", "embed_tokens", "norm", "model.layers.1.input_layernorm")
    left, right = open_both("qwen2", max_grad_norm=0.5, weight_decay=0.1, modules_to_save=whole)
    material, adapter = Material.of(left.plan.layout), adapter_like(left.empty_adapter)
    assert sum(".lora_" not in name for name in adapter) == 4
    found = [*compare_gradients(left, right, adapter, material, 2), *compare_runs(left, right, adapter, material)]
    found += [*compare_updates(left, right, adapter, material)]
    assert all(comparison.passed for comparison in found), _passed(found)
    # One of them that is another by a ten thousandth shows in the gradients.
    nudged = dict(adapter) | {"lm_head.weight": adapter["lm_head.weight"] * np.float32(1 + 1e-4)}
    (window, _) = material.windows(4)
    gradients = [("torch", left.gradient(nudged, window)[0]), ("jax", right.gradient(adapter, window)[0])]
    assert not tensors_apart("gradients", *gradients, GRADIENT.for_depth(2)).passed


def test_torch_and_jax_store_and_merge_alike(backends):
    found = list(compare_storage(*backends))
    assert all(comparison.passed for comparison in found), _passed(found)


def test_a_hundred_steps_on_torch_are_a_hundred_steps_on_jax(runs, start):
    torch_losses, jax_losses = map(_losses, runs)
    assert torch_losses[-1] < 0.8 * torch_losses[0]
    drift = np.abs(torch_losses / jax_losses - 1)
    assert drift.max() <= tolerances.CURVE
    assert drift.mean() <= tolerances.CURVE / 2
    ends = [run[-1].after.adapter for run in runs]
    assert _moved(ends[0], ends[1]) <= tolerances.CURVE * _moved(ends[1], start.adapter)


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.101}, {"max_grad_norm": 1.001}])
def test_a_run_with_another_setting_would_drift_away(open_both, runs, start, wrong):
    other = open_both(FAMILY, **{**RUN, **wrong})[0].steps(start, _windows(), _rates())
    ends = [run[-1].after.adapter for run in (other, runs[0])]
    assert _moved(ends[0], ends[1]) > tolerances.CURVE * _moved(ends[1], start.adapter)


def test_fifty_steps_are_those_of_peft_and_plain_torch(runs, start, folders):
    model, parameters = references.with_adapter(
        references.open_model(folders[FAMILY]), start.adapter, rank=4, alpha=8.0
    )
    windows, losses = _windows()[:PEFT_STEPS], []
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=RUN["weight_decay"])
    for window, rate in zip(windows, _rates(PEFT_STEPS), strict=True):
        optimizer.zero_grad()
        total = sum(references.loss_sum(model, batch) for batch in window)
        (total / sum(batch.supervised_tokens for batch in window)).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), RUN["max_grad_norm"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(total.item())
    trained = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    for run in runs:
        drift = np.abs(_losses(run[:PEFT_STEPS]) / np.array(losses) - 1)
        assert drift.max() <= tolerances.CURVE
        assert _moved(run[PEFT_STEPS - 1].after.adapter, trained) <= tolerances.CURVE * _moved(trained, start.adapter)
