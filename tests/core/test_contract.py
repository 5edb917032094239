"""The contract: closed, checked as a whole, and digested without paths."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.contract import FineTuneContract, contract_fields, kernel_parts, resolve_backend
from mens_core.errors import ContractError
from mens_core.presets import PRESETS, preset_fields

REQUIRED = {"data_dir": "corpus", "output_dir": "run"}

# A valid value for each field that differs from its default.
OTHER = {
    "model": "elsewhere",
    "revision": "v2",
    "tokenizer": "lab",
    "data_dir": "other",
    "seq_len": 64,
    "on_overlong": "drop",
    "method": "qlora",
    "rank": 8,
    "alpha": 1.0,
    "rslora": True,
    "targets": ("q_proj",),
    "block_size": 128,
    "double_quant": False,
    "epochs": 1,
    "max_steps": 5,
    "batch_size": 1,
    "grad_accum": 1,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 7,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
    "seed": 1,
    "backend": "jax",
    "device": "cpu",
    "dtype": "float32",
    "output_dir": "elsewhere",
    "overwrite": True,
}
PLACES = {"model", "revision", "data_dir", "output_dir", "overwrite"}


def test_every_problem_of_a_contract_is_reported_at_once():
    with pytest.raises(ContractError) as caught:
        FineTuneContract.from_fields(rank=0, lerning_rate=1e-3, schedule="cosin", alpha=float("nan"))
    text = str(caught.value)
    assert "rank must be a whole number of at least 1" in text
    assert "did you mean learning_rate?" in text
    assert "did you mean 'cosine'?" in text
    assert "alpha must be a finite number" in text
    assert "data_dir is required" in text
    assert "output_dir is required" in text
    assert "6 problems" in text


def test_fields_survive_the_way_out_and_back():
    contract = FineTuneContract.from_fields(**{**REQUIRED, **OTHER})
    assert FineTuneContract.from_fields(**contract.as_fields()) == contract


def test_the_table_of_other_values_covers_every_field():
    assert OTHER.keys() == {field.name for _, field in contract_fields()}


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_changes_with_every_field_that_changes_the_result_and_with_no_path(name):
    base = FineTuneContract.from_fields(**REQUIRED)
    changed = FineTuneContract.from_fields(**{**REQUIRED, name: OTHER[name]})
    assert (base.digest({}) == changed.digest({})) == (name in PLACES)


def test_the_digest_changes_with_the_contents():
    contract = FineTuneContract.from_fields(**REQUIRED)
    assert contract.digest({"train.jsonl": "a"}) != contract.digest({"train.jsonl": "b"})


@given(st.dictionaries(st.sampled_from(sorted(OTHER)), st.none() | st.integers() | st.text(max_size=4)))
def test_any_values_give_a_contract_or_a_contract_error(values):
    try:
        contract = FineTuneContract.from_fields(**{**REQUIRED, **values})
    except ContractError:
        return
    assert attrs.asdict(contract)


@pytest.mark.parametrize(
    ("backend", "method", "expected"),
    [
        ("lora", None, ("auto", "lora")),
        ("QLoRA", None, ("auto", "qlora")),
        ("burn_lora", None, ("auto", "lora")),
        ("candle-qlora", "qlora", ("auto", "qlora")),
        ("torch", "qlora", ("torch", "qlora")),
        ("torch", None, ("torch", None)),
        ("jax_qlora", None, ("jax", "qlora")),
        ("my_backend", None, ("my_backend", None)),
    ],
)
def test_the_backend_flag_reads_methods_backends_and_kernels(backend, method, expected):
    assert resolve_backend(backend, method) == expected


@pytest.mark.parametrize(("backend", "method"), [("lora", "qlora"), ("torch_qlora", "lora"), ("candle", "lora")])
def test_a_backend_that_contradicts_the_method_is_refused(backend, method):
    with pytest.raises(ContractError, match="asked for as well"):
        resolve_backend(backend, method)


def test_a_kernel_id_splits_at_its_method():
    assert kernel_parts("numpy_qlora") == ("numpy", "qlora")
    assert kernel_parts("qlora") is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_valid_contract(name):
    contract = FineTuneContract.from_fields(**REQUIRED, **preset_fields(name))
    assert contract.adapter.rank == PRESETS[name]["rank"]


def test_an_unknown_preset_is_an_error_with_the_nearest_name():
    with pytest.raises(ContractError, match="did you mean 'safe'"):
        preset_fields("save")


def test_rslora_divides_by_the_root_of_the_rank():
    plain = FineTuneContract.from_fields(**REQUIRED, rank=16, alpha=32)
    stable = FineTuneContract.from_fields(**REQUIRED, rank=16, alpha=32, rslora=True)
    assert plain.adapter.scale == 2.0
    assert stable.adapter.scale == 8.0
