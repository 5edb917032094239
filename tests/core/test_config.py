"""A contract from a file, a preset and explicit fields: one order, closed keys, every problem at once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.config import build_contract
from mens_core.contract import contract_fields
from mens_core.errors import ContractError

REQUIRED = "data_dir: corpus\noutput_dir: run\n"


@pytest.fixture
def config(tmp_path):
    """Write a file and give its path."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_file_preset_and_fields_combine_in_that_order(config):
    path = config(REQUIRED + "rank: 5\nseq_len: 99\nseed: 3\n")
    contract = build_contract(("flag", {"seed": 4}), config=path, preset="tiny")
    assert (contract.adapter.rank, contract.data.seq_len, contract.training.seed) == (4, 128, 4)
    assert contract.origins["rank"] == "preset tiny"
    assert contract.origins["seed"] == "flag"
    assert contract.origins["data_dir"] == f"file {path}"


def test_a_preset_that_the_file_names_gives_way_to_the_file(config):
    path = config(REQUIRED + "preset: 4080\nrank: 5\n")
    contract = build_contract(("flag", {}), config=path)
    assert (contract.adapter.rank, contract.data.seq_len) == (5, 384)
    assert contract.origins["seq_len"] == "preset 4080"


def test_fields_may_stand_under_their_section_and_model_is_both(config):
    flat = build_contract(("flag", {}), config=config(REQUIRED + "model: m\ntokenizer: hf\nlearning_rate: 2e-3\n"))
    grouped = config(
        "model: {model: m, tokenizer: hf}\ndata: {data_dir: corpus}\noutput:\n  output_dir: run\n"
        "training:\n  learning_rate: 2e-3\n"
    )
    assert build_contract(("flag", {}), config=grouped) == flat
    assert flat.training.learning_rate == 2e-3


def test_every_field_can_be_given_in_a_file(config):
    values = build_contract(("call", {"data_dir": "c", "output_dir": "r"})).as_fields()
    given = {name: value for name, value in values.items() if value is not None}
    contract = build_contract(("flag", {}), config=config(json.dumps(given)))
    assert contract.as_fields() == values
    assert set(values) == {field.name for _, field in contract_fields()}


def test_problems_of_file_and_fields_are_reported_together_with_where_they_come_from(config):
    path = config("rnk: 3\nschedule: cosin\n")
    with pytest.raises(ContractError) as caught:
        build_contract(("flag", {"alpha": -1.0}), config=path)
    text = str(caught.value)
    assert f"rnk is not a field, from file {path}; did you mean rank?" in text
    assert "did you mean 'cosine'?" in text
    assert "alpha must be a finite number above 0" in text
    assert "5 problems" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rank: 1\nrank: 2\n", "stands twice"),
        ("adapter: {rank: 1}\nrank: 2\n", "rank is given twice"),
        ("a: &x 1\nb: *x\n", "aliases are not read"),
        ("rank: !!python/object/apply:os.system [ls]\n", "cannot be read"),
        ("- rank\n", "no mapping"),
        ("", "no mapping"),
        ("3: x\n", "is no word"),
        ("rank: [\n", "cannot be read"),
        ("preset: save\n", "did you mean 'safe'"),
        ("rank: '8'\n", "rank must be a whole number"),
        ("rank: yes\n", "rank must be a whole number"),
    ],
)
def test_a_file_that_makes_no_sense_says_why(config, text, problem):
    with pytest.raises(ContractError, match=problem):
        build_contract(("flag", {"data_dir": "c", "output_dir": "r"}), config=config(text))


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ContractError, match="cannot be read"):
        build_contract(("flag", {}), config=tmp_path / "none.yaml")


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60)
    | st.from_regex(r"([a-z_]{1,8}: [-\[{*&!a-z0-9.]{0,8}\n){1,4}")
)
def test_any_text_is_a_contract_or_a_contract_error(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        contract = build_contract(("flag", {"data_dir": "c", "output_dir": "r"}), config=path)
    except ContractError:
        return
    assert contract.as_fields()
