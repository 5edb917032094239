"""What a step costs, how costs become seconds, and which measured speeds are believed."""

import json
import math

import attrs
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mens_core import speeds
from mens_core.artifacts.adapter import initial_state
from mens_core.contract import FineTuneContract
from mens_core.costs import (
    COSTS,
    adapted_linears,
    adapter_parameters,
    nf4_bytes,
    rows_memory,
    standing_memory,
    step_costs,
    step_seconds,
)
from mens_core.exchange import BatchShape, NF4Spec
from mens_core.hf.keymap import linear_shapes, tensor_shapes
from mens_core.hf.layout import Layout
from mens_core.measuring import fit_seconds
from mens_core.plan import BaseWeights, Speed, Workload
from mens_core.speeds import conditions, outdated_speeds, read_speeds, store_speed

LAYOUT = Layout(
    model_type="llama",
    family="llama",
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=6,
    vocab_size=10,
    max_positions=16,
    norm_eps=1e-6,
    tied=True,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    architectures=("LlamaForCausalLM",),
    layer_types=("full_attention", "full_attention"),
    linear=None,
    config={},
)
PARAMETERS = sum(math.prod(shape) for shape in tensor_shapes(LAYOUT).values())
WEIGHTS = BaseWeights(parameters=PARAMETERS, stored_bytes=4 * PARAMETERS, linears=linear_shapes(LAYOUT))
WORK = Workload(
    shape=BatchShape(rows=2, tokens=6, longest_row=4, supervised=3, batches=1),
    batches=1,
    tokens=6,
    supervised=3,
    pairs=20,
    rows=2,
    row_tokens=3.0,
    steps=1,
    source="a test",
)
KERNEL = "torch_lora cpu float32"
SPEED = Speed(seconds=dict.fromkeys(COSTS, 1e-9), source="a test")


def _contract(**fields):
    return FineTuneContract.from_fields(trains=False, **{"rank": 3} | fields)


def _flops(rows, inner, out):
    """Of one matrix product (rows, inner) · (inner, out)."""
    return 2 * rows * inner * out


def test_products_are_those_one_counts_by_hand():
    # q and o are (4, 4), k and v (2, 4), gate and up (6, 4), down (4, 6); x Wᵀ and dy W for each
    layer = 2 * _flops(6, 4, 4) + 2 * _flops(6, 4, 2) + 2 * _flops(6, 4, 6) + _flops(6, 6, 4)
    head = _flops(3, 4, 10)
    assert step_costs(LAYOUT, WEIGHTS, _contract(), WORK)["products"] == 2 * (2 * layer + head)


def test_an_adapter_has_six_thin_products():
    costs = step_costs(LAYOUT, WEIGHTS, _contract(targets=("k_proj",)), WORK)
    # forward x Aᵀ and (x Aᵀ) Bᵀ; backward dy B and u A for dx, uᵀ x for dA, dyᵀ (x Aᵀ) for dB
    assert costs["adapter"] == 2 * (3 * _flops(6, 4, 3) + 3 * _flops(6, 3, 2))
    assert costs["updates"] == 2 * 3 * (4 + 2)


def test_attention_has_two_products_forward_and_five_backward():
    # 20 pairs of tokens, two heads of width two, two layers
    assert step_costs(LAYOUT, WEIGHTS, _contract(), WORK)["attention"] == 7 * 2 * _flops(20, 2, 1) * 2


def test_layers_that_are_computed_again_run_forward_once_more_and_nothing_else_does():
    contract = _contract(gradient_checkpointing=True)
    once, again = (step_costs(LAYOUT, WEIGHTS, chosen, WORK) for chosen in (_contract(), contract))
    layers = once["products"] - 2 * _flops(3, 4, 10)
    # of two products with a frozen linear one is forward, of six with an adapter two, of attention's seven two
    assert again["products"] == once["products"] + layers / 2
    assert again["adapter"] == pytest.approx(once["adapter"] * 4 / 3)
    assert again["attention"] == pytest.approx(once["attention"] * 9 / 7)
    assert once["weights"] < again["weights"] < 1.5 * once["weights"]
    assert all(again[name] == 1.5 * once[name] for name in ("elementwise", "layers"))
    assert all(again[name] == once[name] for name in ("logits", "updates"))


@pytest.mark.parametrize("part", ["tokens", "supervised", "pairs", "batches"])
@given(more=st.integers(1, 1000))
def test_more_of_any_part_of_the_work_costs_more(part, more):
    less, grown = (
        step_costs(LAYOUT, WEIGHTS, _contract(), work)
        for work in (WORK, attrs.evolve(WORK, **{part: getattr(WORK, part) + more}))
    )
    assert all(grown[name] >= less[name] for name in COSTS)
    assert step_seconds(grown, SPEED) > step_seconds(less, SPEED)


@pytest.mark.parametrize("field", ["rank", "hidden_size", "intermediate_size", "vocab_size", "num_heads"])
def test_a_larger_model_costs_more(field):
    layout = LAYOUT if field == "rank" else attrs.evolve(LAYOUT, **{field: 2 * getattr(LAYOUT, field)})
    weights = attrs.evolve(WEIGHTS, linears=linear_shapes(layout))
    contract = _contract(rank=6 if field == "rank" else 3)
    less, more = step_costs(LAYOUT, WEIGHTS, _contract(), WORK), step_costs(layout, weights, contract, WORK)
    assert all(more[name] >= less[name] for name in COSTS)
    assert more != less


def test_the_layers_add_up():
    def of(layers):
        layout = attrs.evolve(LAYOUT, num_layers=layers)
        return step_costs(layout, attrs.evolve(WEIGHTS, linears=linear_shapes(layout)), _contract(), WORK)

    one, two, three = of(1), of(2), of(3)
    assert all(three[name] - two[name] == pytest.approx(two[name] - one[name]) for name in COSTS)


def test_seconds_are_the_sum_of_counts_times_seconds_a_unit():
    assert step_seconds({"products": 10.0, "logits": 2.0}, Speed(seconds={"products": 0.5}, source="")) == 5.0


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj"), ("model.layers.1.mlp.up_proj",)])
def test_an_adapter_has_as_many_numbers_as_its_tensors(targets):
    contract = _contract(targets=targets)
    shapes = adapted_linears(WEIGHTS, contract.adapter)
    tensors = {f"{path}.lora_A.weight": np.empty((3, into), np.float32) for path, (_, into) in shapes.items()}
    tensors |= {f"{path}.lora_B.weight": np.empty((out, 3), np.float32) for path, (out, _) in shapes.items()}
    real = sum(tensor.nbytes for tensor in initial_state(tensors, seed=0).adapter.values())
    assert standing_memory(LAYOUT, WEIGHTS, contract, "float32")["adapter"] == real
    assert adapter_parameters(WEIGHTS, contract.adapter) * 4 == real
    assert len(shapes) == {"all-linear": 14, "q_proj": 4}.get(targets[0], 1)


def test_nf4_takes_the_bits_that_its_authors_state():
    numbers = 1 << 24
    assert 8 * nf4_bytes(numbers, NF4Spec()) / numbers == pytest.approx(4.127, abs=5e-4)
    assert 8 * nf4_bytes(numbers, NF4Spec(double_quant=False)) / numbers == 4.5


def test_a_number_format_halves_the_base_and_not_the_adapter():
    wide, narrow = (standing_memory(LAYOUT, WEIGHTS, _contract(), dtype) for dtype in ("float32", "bfloat16"))
    assert wide["base"] == 2 * narrow["base"] == 4 * PARAMETERS
    assert {**wide, "base": 0} == {**narrow, "base": 0}


def _timings(seconds_a_unit, seed):
    """Steps of random size, half of them small, and what they take at a given speed."""
    random = np.random.default_rng(seed)
    costs = [
        {
            name: float(scale / seconds * random.lognormal(sigma=1.5))
            for name, seconds in zip(COSTS, seconds_a_unit, strict=True)
        }
        for scale in np.where(np.arange(16) % 2, 0.1, 0.01)
    ]
    speed = Speed(seconds=dict(zip(COSTS, seconds_a_unit, strict=True)), source="")
    return costs, [step_seconds(cost, speed) for cost in costs]


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_recovers_the_speed_that_made_the_timings(seed):
    # a machine that is not the common one in any of its proportions
    wanted = [3e-12, 3e-12, 5e-12, 3e-10, 1e-9, 2e-10, 5e-4, 2e-9]
    costs, seconds = _timings(wanted, seed)
    found = fit_seconds(costs, seconds)
    assert [found[name] for name in COSTS] == pytest.approx(wanted, rel=0.15)
    speed = Speed(seconds=found, source="")
    assert [step_seconds(cost, speed) for cost in costs] == pytest.approx(seconds, rel=0.03)


def test_a_fit_of_disturbed_timings_has_no_negative_speed_and_stays_near():
    wanted = [1e-11, 1e-11, 9e-12, 1.5e-9, 2.5e-9, 8e-10, 1e-3, 5e-9]
    costs, seconds = _timings(wanted, seed=7)
    disturbed = [taken * (1.4 if number % 3 else 1.0) for number, taken in enumerate(seconds)]
    found = fit_seconds(costs, disturbed)
    assert min(found.values()) >= 0
    speed = Speed(seconds=found, source="")
    assert all(0.6 < step_seconds(cost, speed) / taken < 2 for cost, taken in zip(costs, seconds, strict=True))


@pytest.fixture
def file(tmp_path):
    """A file of speeds with one entry."""
    path = tmp_path / "cache" / "speeds.json"
    store_speed(KERNEL, SPEED, tiny.MACHINE, path)
    return path


def test_a_speed_that_was_kept_is_read_back(file):
    other = attrs.evolve(SPEED, source="another")
    store_speed("jax_lora cpu float32", other, tiny.MACHINE, file)
    assert read_speeds(tiny.MACHINE, file) == {KERNEL: SPEED, "jax_lora cpu float32": other}
    assert [path.name for path in file.parent.iterdir()] == ["speeds.json"]


def test_rows_take_their_ids_and_masks_and_something_for_each_row():
    more = attrs.evolve(WORK, row_tokens=WORK.row_tokens + 100)
    assert rows_memory(more) - rows_memory(WORK) == 5 * 100 * WORK.rows
    assert rows_memory(attrs.evolve(WORK, rows=2 * WORK.rows)) == 2 * rows_memory(WORK)


def test_without_a_file_nothing_is_known_and_nothing_is_wrong(tmp_path, caplog):
    assert read_speeds(tiny.MACHINE, tmp_path / "speeds.json") == {}
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "named"), [({"processor": "another"}, "processor"), ({"cpu_count": 64}, "cpu_count")]
)
def test_a_speed_of_another_machine_is_named_and_not_used(file, changes, named):
    machine = attrs.evolve(tiny.MACHINE, **changes)
    assert read_speeds(machine, file) == {}
    assert named in outdated_speeds(machine, file)[KERNEL]
    assert "doctor --measure" in outdated_speeds(machine, file)[KERNEL]


def test_a_speed_of_another_version_is_not_used(file):
    body = json.loads(file.read_text())
    body["speeds"][KERNEL]["conditions"]["versions"]["torch"] = "0.1"
    file.write_text(json.dumps(body))
    assert read_speeds(tiny.MACHINE, file) == {}
    assert "versions" in outdated_speeds(tiny.MACHINE, file)[KERNEL]


def test_a_speed_with_other_threads_is_not_used(file, monkeypatch):
    assert outdated_speeds(tiny.MACHINE, file) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    assert read_speeds(tiny.MACHINE, file) == {}
    assert "threads" in outdated_speeds(tiny.MACHINE, file)[KERNEL]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "another", "speeds": {}}',
        '{"format": "mens.speeds.v1", "speeds": {"torch_lora cpu float32": {}}}',
        '{"format": "mens.speeds.v1", "speeds": {"k": {"source": "", "conditions": {}, "seconds": {"products": -1}}}}',
        '{"format": "mens.speeds.v1", "speeds": {"k": {"source": "", "conditions": {}, "seconds": {"products": NaN}}}}',
    ],
)
def test_a_damaged_file_is_reported_and_not_used(file, caplog, text):
    file.write_text(text)
    assert read_speeds(tiny.MACHINE, file) == {}
    assert "cannot be read" in caplog.text
    assert str(file) in caplog.text


def test_speeds_are_kept_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speeds.speeds_file() == tmp_path / "mens-core" / "speeds.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert speeds.speeds_file() == tmp_path / ".cache" / "mens-core" / "speeds.json"


def test_what_a_measurement_depends_on_names_the_framework_s_version():
    assert {"torch", "transformers", "mens-core"} <= set(conditions("torch_lora", tiny.MACHINE)["versions"])
    assert {"jax", "flax"} <= set(conditions("jax_qlora", tiny.MACHINE)["versions"])
