"""What a backend says it can do, before anything is spent."""

import attrs
import pytest
import tiny

from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError
from mens_core.hf.layout import read_layout


def _offer(backend, folder, layout=None, **fields):
    contract = FineTuneContract.from_fields(trains=False, model=str(folder), **fields)
    return backend.plan(contract, layout or read_layout(folder), tiny.MACHINE, tiny.WEIGHTS, None)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_known_family_is_offered_with_both_methods(backend, folders, family, method):
    offer = _offer(backend, folders[family], method=method, device="cpu")
    assert (offer.kernel, offer.feasible, offer.reason) == (f"{backend.name}_{method}", True, None)
    assert (offer.device, offer.dtype, offer.capacity_bytes) == ("cpu", "float32", tiny.MACHINE.memory_bytes)


def test_the_same_question_has_the_same_answer(backend, folders):
    assert _offer(backend, folders["llama"]) == _offer(backend, folders["llama"])


def test_a_device_that_is_not_there_is_refused_with_what_is(backend, folders):
    offer = _offer(backend, folders["llama"], device="cuda:63")
    assert not offer.feasible
    assert "cuda:63" in offer.reason
    assert "cpu" in offer.reason


def test_a_model_nobody_knows_is_refused_by_its_name(backend, folders):
    layout = attrs.evolve(read_layout(folders["llama"]), model_type="ferment", family=None)
    offer = _offer(backend, folders["llama"], layout=layout, device="cpu")
    assert not offer.feasible
    assert "ferment" in offer.reason


def test_a_base_that_is_quantised_already_is_refused(backend, folders):
    layout = read_layout(folders["llama"])
    layout = attrs.evolve(layout, config={**layout.config, "quantization_config": {"quant_method": "gptq"}})
    offer = _offer(backend, folders["llama"], layout=layout, device="cpu")
    assert not offer.feasible
    assert "quantised" in offer.reason


def test_a_number_format_that_was_asked_for_is_kept(part):
    device = part("device")
    assert device.pick_device("cpu", tiny.MACHINE) == "cpu"
    assert [device.pick_dtype("auto", where) for where in ("cpu", "cuda:0")] == ["float32", "bfloat16"]
    assert [device.pick_dtype(asked, "cpu") for asked in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("device", ["cuda:63", "tpu", "", "cuda:x"])
def test_an_unknown_device_is_an_error_that_says_what_there_is(part, device):
    with pytest.raises(ContractError, match="no device") as caught:
        part("device").pick_device(device, tiny.MACHINE)
    assert "cpu" in caught.value.expected
