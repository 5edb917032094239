"""The certificate's comparisons hold for both backends, and every mistake they are there for makes them fail."""

import json
import types
from pathlib import Path

import attrs
import numpy as np
import pytest
import tiny
import tolerances

from mens_core.cli import main
from mens_core.exchange import IGNORE
from mens_core.hf.layout import read_layout
from mens_core.parity import bounds, schedules
from mens_core.parity.comparison import apart, bytes_apart, tensors_apart
from mens_core.parity.graph import compare_graphs, compare_logits, compare_loss
from mens_core.parity.learning import (
    UNBOUNDED,
    compare_accumulation,
    compare_gradients_with_oracle,
    compare_runs_with_oracle,
    compare_updates_with_oracle,
)
from mens_core.parity.material import Material, adapter_like
from mens_core.parity.models import write_family, write_with_huge_logits
from mens_core.parity.storage import compare_storage_with_oracle
from mens_core.parity.witness import BackendWitness, OracleWitness, obstacle_to_oracle
from mens_core.testing.oracle import decoder
from mens_core.testing.oracle.rotary import rotate

PLAIN = {"max_grad_norm": UNBOUNDED, "weight_decay": 0.0}


@pytest.fixture
def material(folders, family):
    return Material.of(read_layout(folders[family]))


@pytest.fixture
def witness(backend, session_of, folders, family):
    """The backend on the family, without clipping; its session is the one that other tests have open."""
    session = session_of(family, max_grad_norm=UNBOUNDED)
    return BackendWitness(
        backend=backend, plan=tiny.plan_for(backend, folders[family], max_grad_norm=UNBOUNDED), session=session
    )


@pytest.fixture
def adapter(witness):
    return adapter_like(witness.empty_adapter)


@pytest.fixture
def oracle(witness):
    return OracleWitness.like(witness)


def _failed(comparisons):
    return [(found.what, found.max_error, found.bound.value) for found in comparisons if not found.passed]


def test_a_graph_is_the_specifications(witness, oracle, adapter, material):
    assert not _failed(compare_graphs(witness, oracle, adapter, material, 2))


def test_a_quantised_graph_is_the_specifications(backend, session_of, folders, family, material):
    fields = {"method": "qlora", "max_grad_norm": UNBOUNDED}
    plan = tiny.plan_for(backend, folders[family], **fields)
    witness = BackendWitness(backend=backend, plan=plan, session=session_of(family, **fields))
    adapter, oracle = adapter_like(witness.empty_adapter), OracleWitness.like(witness)
    assert not _failed(compare_graphs(witness, oracle, adapter, material, 2))
    assert not _failed(compare_gradients_with_oracle(witness, oracle, adapter, material, 2))
    unquantised = OracleWitness(oracle=decoder.Oracle.open(folders[family], scale=2.0))
    assert not compare_logits("", witness, unquantised, adapter, material.batch, 2).passed


def test_gradients_are_the_specifications_derivatives(witness, oracle, adapter, material):
    assert not _failed(compare_gradients_with_oracle(witness, oracle, adapter, material, 2))


def test_an_update_is_the_specifications(backend, session_of, folders, family, witness, adapter, material):
    gradient, step = witness.gradient(adapter, material.windows(4)[0])
    fields = {"max_grad_norm": 0.5, "weight_decay": 0.1}
    assert step.norm > 2 * fields["max_grad_norm"]
    plan = tiny.plan_for(backend, folders[family], **fields)
    clipping = BackendWitness(backend=backend, plan=plan, session=session_of(family, **fields))
    assert not _failed(compare_updates_with_oracle(clipping, gradient, adapter, material))
    for wrong in ({"max_grad_norm": 0.5001}, {"weight_decay": 0.1001}):
        other = attrs.evolve(clipping, plan=tiny.plan_for(backend, folders[family], **{**fields, **wrong}))
        assert _failed(compare_updates_with_oracle(other, gradient, adapter, material)), wrong


def test_windows_may_be_cut_anyhow_and_the_last_may_be_partial(witness, adapter, material):
    assert [len(window) for window in material.windows(2)] == [4, 2]
    assert not _failed(compare_accumulation(witness, adapter, material))


def test_the_losses_of_a_run_are_the_specifications(witness, oracle, adapter, material):
    assert not _failed(compare_runs_with_oracle(witness, oracle, adapter, material, 2))


def test_storage_and_merging_are_the_specifications(backend):
    assert not _failed(compare_storage_with_oracle(backend))


def _flipped(oracle, change):
    """The specification with other weights."""
    changed = {name: change(name, weight) for name, weight in oracle.oracle.base.items()}
    return OracleWitness(oracle=attrs.evolve(oracle.oracle, base=changed))


def _scaled(oracle):
    return OracleWitness(oracle=attrs.evolve(oracle.oracle, scale=oracle.oracle.scale * (1 + 5e-5)))


def _without_a_bias(oracle):
    return _flipped(oracle, lambda name, weight: 0 * weight if name.endswith("1.attn.c_attn.bias") else weight)


def _with_a_transposed_weight(oracle):
    names = ("0.self_attn.o_proj.weight", "0.attn.c_proj.weight")
    return _flipped(oracle, lambda name, weight: weight.T if name.endswith(names) else weight)


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        *((family, _scaled) for family in tiny.CONFIGS),
        ("gpt2", _without_a_bias),
        ("gpt2", _with_a_transposed_weight),
        ("llama", _with_a_transposed_weight),
    ],
)
def test_a_mistake_in_the_weights_fails(witness, oracle, adapter, material, mistake):
    wrong = mistake(oracle)
    failed = {what for what, _, _ in _failed(compare_graphs(witness, wrong, adapter, material, 2))}
    assert "logits with the adapter" in failed
    assert _failed(compare_gradients_with_oracle(witness, wrong, adapter, material, 2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("mistake", ["swapped halves", "interleaved pairs", "one position late"])
def test_a_mistake_in_the_rotation_fails(monkeypatch, witness, oracle, adapter, material, mistake):
    def wrong(x, positions, frequencies):
        half = x.shape[-1] // 2
        if mistake == "swapped halves":
            return np.roll(rotate(np.roll(x, half, axis=-1), positions, frequencies), half, axis=-1)
        if mistake == "interleaved pairs":
            places = np.arange(2 * half).reshape(half, 2).T.reshape(-1)
            return rotate(x[..., places], positions, frequencies)[..., np.argsort(places)]
        return rotate(x, np.where(positions > 2, positions + 1, positions), frequencies)

    assert compare_logits("", witness, oracle, adapter, material.batch, 2).passed
    monkeypatch.setattr(decoder, "rotate", wrong)
    assert not compare_logits("", witness, oracle, adapter, material.batch, 2).passed


@pytest.mark.parametrize("mistake", ["shifted mask", "labels off by one", "unshifted labels", "one target more"])
def test_a_mistake_in_the_labels_fails(witness, oracle, adapter, material, mistake):
    batch = material.batch
    targets, supervised = batch.targets.copy(), batch.targets != IGNORE
    if mistake == "shifted mask":
        targets = np.where(np.roll(supervised, 1), np.roll(batch.input_ids, -1), IGNORE).astype(np.int32)
    elif mistake == "labels off by one":
        targets[supervised] = (targets[supervised] + 1) % tiny.VOCABULARY
    elif mistake == "unshifted labels":
        targets[supervised] = batch.input_ids[supervised]
    else:
        place = np.flatnonzero(~supervised[:8])[0]
        targets[place] = batch.input_ids[place + 1]
    told = types.SimpleNamespace(
        name="mistaken", loss=lambda adapter, _: witness.loss(adapter, attrs.evolve(batch, targets=targets))
    )
    assert compare_loss("", witness, oracle, adapter, batch, 2).passed
    assert not compare_loss("", told, oracle, adapter, batch, 2).passed


@pytest.mark.parametrize("family", ["llama"])
def test_logits_of_a_hundredfold_size_are_no_harder(backend, folders, family, material, adapter, tmp_path):
    write_with_huge_logits(folders[family], tmp_path)
    witness = BackendWitness.open(tiny.plan_for(backend, tmp_path), backend, tiny.SHAPE)
    oracle = OracleWitness.like(witness)
    assert np.abs(oracle.logits(adapter, material.batch)).max() > 500  # e^89 is beyond float32
    assert compare_loss("", witness, oracle, adapter, material.batch, 2).passed


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_familys_tiny_model_has_logits_of_an_honest_size(tmp_path, family):
    write_family(tmp_path, family)
    oracle = decoder.Oracle.open(tmp_path, scale=1.0)
    assert 5 < np.abs(oracle.logits({}, Material.of(oracle.layout).batch)).max() < 30


def test_a_certificate_asks_no_less_than_the_tests_do():
    for name in ("GRADIENT", "ACCUMULATION", "ADAMW", "TRAJECTORY", "MERGE", "MEAN", "LOSS"):
        assert getattr(bounds, name).value <= getattr(tolerances, name), name
    # a certificate takes any model, the tests' own have logits from 12 to 19
    assert bounds.LOGITS.value * 12 <= 2.1 * tolerances.LOGITS
    assert bounds.LOGITS.for_depth(8).value == 2 * bounds.LOGITS.value
    assert bounds.LOGITS.for_depth(1) == bounds.LOGITS


@pytest.mark.parametrize("home", [bounds, tolerances])
def test_the_page_on_numerics_has_every_tolerance_with_its_value(home):
    lines = (Path(__file__).parents[2] / "docs/numerics.md").read_text(encoding="utf-8").splitlines()
    for name, value in vars(home).items():
        if name.isupper():
            number = getattr(value, "value", value)
            rows = [line.split("|") for line in lines if line.startswith(f"| `{name}` |")]
            assert any(float(row[2].split()[0].rstrip(",")) == number for row in rows), name


def test_no_number_is_no_agreement():
    assert not apart("", ("", [1.0, np.nan]), ("", [1.0, 1.0]), bounds.LOGITS, 1.0).passed
    assert not tensors_apart("", ("", {"a": np.array([np.inf])}), ("", {"a": np.ones(1)}), bounds.LOGITS).passed
    one = np.zeros(3, np.uint8)
    assert bytes_apart("", ("", [one]), ("", [one])).passed
    assert not bytes_apart("", ("", [one]), ("", [one.astype(np.int8)])).passed
    assert bytes_apart("", ("", [np.array([0, 4], np.uint8)]), ("", [np.array([0, 5], np.uint8)])).max_error == 1


def test_answers_of_other_shapes_or_names_are_not_compared():
    with pytest.raises(ValueError, match="shapes"):
        apart("", ("", np.ones(3)), ("", np.ones((3, 1))), bounds.LOGITS, 1.0)
    with pytest.raises(ValueError, match="different names"):
        tensors_apart("", ("", {"a": np.ones(1)}), ("", {"b": np.ones(1)}), bounds.LOGITS)


def test_what_the_specification_cannot_do_has_a_reason(folders):
    layout = read_layout(folders["llama"])
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}
    assert obstacle_to_oracle(layout, 10**6) is None
    assert "too many" in obstacle_to_oracle(layout, 10**9)
    assert "yarn" in obstacle_to_oracle(attrs.evolve(layout, config={**layout.config, **yarn}), 1)
    assert "mish" in obstacle_to_oracle(attrs.evolve(layout, config={**layout.config, "hidden_act": "mish"}), 1)
    assert "mistral" in obstacle_to_oracle(attrs.evolve(layout, family="mistral", model_type="mistral"), 1)


def test_the_command_writes_a_certificate_and_ends_with_its_verdict(tmp_path, capsys, monkeypatch):
    output = tmp_path / "parity.json"
    words = ["parity", "--family", "qwen3", "--backends", "torch", "--output", str(output)]
    assert main(words) == 0
    assert "all hold" in capsys.readouterr().out
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["passed"]
    (model,) = found["models"]
    assert set(model["kernels"]) == {"torch_lora", "torch_qlora"}
    assert "held to the specification only" in model["notes"][0]
    keys = {
        "what",
        "left",
        "right",
        "shape",
        "tolerance",
        "unit",
        "source",
        "max_error",
        "mean_error",
        "ulps",
        "passed",
    }
    assert all(set(comparison) == keys for comparison in model["comparisons"])
    assert found["versions"]["torch"]
    late = schedules.learning_rate
    monkeypatch.setattr(schedules, "learning_rate", lambda step, **settings: late(step + 1, **settings))
    assert main(words) == 1
    assert "FAILS" in capsys.readouterr().out
    assert not json.loads(output.read_text(encoding="utf-8"))["passed"]


@pytest.mark.parametrize(
    "words", [[], ["--family", "bert"], ["--family", "llama", "--model", "x"], ["--model", "none"]]
)
def test_a_question_that_cannot_be_answered_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["parity", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
