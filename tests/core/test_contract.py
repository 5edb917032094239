"""The contract: closed, checked as a whole, and digested without paths."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.contract import RETIRED, FineTuneContract, contract_fields, kernel_parts
from mens_core.errors import ContractError
from mens_core.gates import contract_gates
from mens_core.presets import ALIASES, PRESETS, preset_fields

REQUIRED = {"data_dir": "corpus", "output_dir": "run"}

# A valid value for each field that differs from its default.
OTHER = {
    "model": "elsewhere",
    "revision": "v2",
    "tokenizer": "lab",
    "tokenizer_json": "tokenizer.json",
    "scan_weights": True,
    "base_family": "qwen2.5",
    "upstream_model_id": "owner/name",
    "license_class": "apache-2.0",
    "attribution_required": True,
    "data_dir": "other",
    "seq_len": 64,
    "on_overlong": "drop",
    "truncation_side": "left",
    "supervise": "suffix-8",
    "on_bad_row": "skip",
    "packing": "best-fit",
    "min_rating": 3,
    "context_filter": "code",
    "min_rows": 10,
    "max_skip_rate": 0.1,
    "method": "qlora",
    "rank": 8,
    "alpha": 1.0,
    "rslora": True,
    "rank_pattern": {"q_proj": 4, r"layers\.1\..*": 2},
    "alpha_pattern": {"q_proj": 4.0},
    "targets": ("q_proj",),
    "modules_to_save": ("lm_head",),
    "dropout": 0.05,
    "start_from": "run-before",
    "adapter_tag": "mine",
    "base_quant": "nf4",
    "block_size": 128,
    "double_quant": False,
    "qlora_require_full_proxy_stack": True,
    "qlora_allow_partial_proxy_stack": True,
    "epochs": 1,
    "max_steps": 5,
    "batch_size": 1,
    "grad_accum": 1,
    "gradient_checkpointing": True,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 7,
    "weight_decay": 0.1,
    "on_non_finite": "skip-window",
    "max_grad_norm": 0.3,
    "seed": 1,
    "eval_every": 10,
    "early_stopping_patience": 2,
    "early_stopping_min_delta": 0.01,
    "checkpoint_every": 7,
    "keep_checkpoints": 1,
    "max_time": 60.0,
    "resume": "auto",
    "resume_anyway": True,
    "backend": "jax",
    "kernel": "burn_lora",
    "device": "cpu",
    "dtype": "float32",
    "max_memory": 1 << 30,
    "max_vram_fraction": 0.5,
    "output_dir": "elsewhere",
    "report_to": ("tensorboard",),
    "overwrite": True,
    "certify": True,
    "deployment_target": "mobile_edge",
}
# Places enter by their content; limits and checks do not change what a run computes.
NOT_IN_THE_DIGEST = {
    "model",
    "revision",
    "tokenizer_json",
    "scan_weights",
    "data_dir",
    "kernel",
    "max_memory",
    "max_vram_fraction",
    "output_dir",
    "report_to",
    "overwrite",
    "start_from",
    "certify",
    "checkpoint_every",
    "keep_checkpoints",
    "max_time",
    "resume",
    "resume_anyway",
}
CONTRADICTION = {"qlora_require_full_proxy_stack": True, "qlora_allow_partial_proxy_stack": True}
TOGETHER = {name: value for name, value in OTHER.items() if name != "qlora_allow_partial_proxy_stack"}


def test_every_problem_of_a_contract_is_reported_at_once():
    with pytest.raises(ContractError) as caught:
        FineTuneContract.from_fields(
            rank=0, lerning_rate=1e-3, schedule="cosin", alpha=float("nan"), block_size=65, **CONTRADICTION
        )
    text = str(caught.value)
    assert "rank must be a whole number of at least 1" in text
    assert "did you mean learning_rate?" in text
    assert "did you mean 'cosine'?" in text
    assert "alpha must be a finite number" in text
    assert "block_size must be a power of two" in text
    assert "contradict each other" in text
    assert "data_dir is required" in text
    assert "output_dir is required" in text
    assert "8 problems" in text


def test_fields_survive_the_way_out_and_back():
    contract = FineTuneContract.from_fields(**{**REQUIRED, **TOGETHER})
    assert FineTuneContract.from_fields(**contract.as_fields()) == contract


def test_the_table_of_other_values_covers_every_field():
    assert OTHER.keys() == {field.name for _, field in contract_fields()}


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_changes_with_every_field_that_changes_the_result_and_with_no_path(name):
    base = FineTuneContract.from_fields(**REQUIRED)
    changed = FineTuneContract.from_fields(**{**REQUIRED, name: OTHER[name]})
    assert (base.digest({}) == changed.digest({})) == (name in NOT_IN_THE_DIGEST)


CHANGES = st.sets(st.sampled_from(sorted(TOGETHER)), max_size=6)


@given(CHANGES, CHANGES)
def test_two_digests_are_equal_exactly_where_what_determines_the_result_is(first, second):
    one, other = (
        FineTuneContract.from_fields(**{**REQUIRED, **{name: OTHER[name] for name in names}})
        for names in (first, second)
    )
    # A kernel's name stands for the method it names.
    counted = [{**contract.as_fields(), **dict.fromkeys(NOT_IN_THE_DIGEST)} for contract in (one, other)]
    assert (one.digest({}) == other.digest({})) == (counted[0] == counted[1])


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
    ("backend", "expected"),
    [
        ("lora", ("auto", "lora", "burn_lora")),
        ("QLoRA", ("auto", "qlora", "candle_qlora")),
        ("burn_lora", ("auto", "lora", "burn_lora")),
        ("candle-qlora", ("auto", "qlora", "candle_qlora")),
        ("torch", ("torch", "lora", None)),
        ("jax_qlora", ("jax", "qlora", "jax_qlora")),
        ("my_backend", ("my_backend", "lora", None)),
    ],
)
def test_the_backend_field_reads_methods_labels_backends_and_kernels(backend, expected):
    contract = FineTuneContract.from_fields(**REQUIRED, backend=backend)
    assert (contract.compute.backend, contract.adapter.method, contract.compute.kernel) == expected


def test_a_kernel_named_alone_fixes_backend_and_method():
    contract = FineTuneContract.from_fields(**REQUIRED, kernel="jax_qlora")
    assert contract == FineTuneContract.from_fields(**REQUIRED, backend="jax_qlora")
    assert contract.origins["method"] == "call"


@pytest.mark.parametrize(
    ("fields", "agrees"),
    [
        ({"backend": "lora", "method": "lora"}, True),
        ({"backend": "lora", "method": "qlora"}, False),
        ({"backend": "torch_qlora", "method": "lora"}, False),
        ({"backend": "candle", "method": "lora"}, False),
        ({"backend": "torch", "kernel": "jax_lora"}, False),
        ({"backend": "torch", "kernel": "torch_lora"}, True),
        ({"kernel": "nonsense"}, False),
    ],
)
def test_a_forced_kernel_is_compared_with_the_one_that_method_and_backend_come_to(fields, agrees):
    (gate,) = (
        gate
        for gate in contract_gates(FineTuneContract.from_fields(**REQUIRED, **fields))
        if gate.code == "forced_kernel_agrees"
    )
    assert gate.passed == agrees
    assert "inferred" in gate.message


def test_two_flags_that_contradict_each_other_are_a_problem_of_the_contract():
    with pytest.raises(ContractError, match="contradict each other"):
        FineTuneContract.from_fields(**REQUIRED, **CONTRADICTION)


@pytest.mark.parametrize("name", RETIRED)
def test_a_field_of_the_older_system_is_met_with_what_to_do_instead(name):
    with pytest.raises(ContractError) as caught:
        FineTuneContract.from_fields(**REQUIRED, **{name: 1})
    assert f"{name} is not a field; {RETIRED[name]}" in str(caught.value)


def test_of_two_layers_the_later_one_wins_and_every_value_knows_its_own():
    layers = [("file a", {**REQUIRED, "rank": 4, "seed": 7}), ("preset b", {"rank": 8}), ("flag", {"alpha": 3})]
    contract = FineTuneContract.from_layers(layers)
    assert (contract.adapter.rank, contract.adapter.alpha, contract.training.seed) == (8, 3.0, 7)
    assert contract.origins == {
        "data_dir": "file a",
        "output_dir": "file a",
        "seed": "file a",
        "rank": "preset b",
        "alpha": "flag",
    }
    with pytest.raises(ContractError, match=r"rank must be .* \(got 0, from file a\)"):
        FineTuneContract.from_layers([("file a", {**REQUIRED, "rank": 0})])


def test_a_changed_contract_keeps_what_is_not_changed():
    contract = FineTuneContract.from_fields(**REQUIRED, rank=3, backend="torch_qlora")
    changed = contract.changed("advice", batch_size=1)
    assert (changed.adapter.rank, changed.training.batch_size, changed.compute.kernel) == (3, 1, "torch_qlora")
    assert (changed.origins["rank"], changed.origins["batch_size"]) == ("call", "advice")


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 << 30), ("1.5 gb", 1_500_000_000), ("800MB", 800_000_000), ("64k", 64_000), ("9", 9)]
)
def test_a_size_is_read_as_it_is_written(text, size):
    assert FineTuneContract.from_fields(**REQUIRED, max_memory=text).compute.max_memory == size


@pytest.mark.parametrize("text", ["", "much", "-1", "6 pounds", "0"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ContractError, match="max_memory must be a size such as 6GiB"):
        FineTuneContract.from_fields(**REQUIRED, max_memory=text)


def test_a_kernel_id_splits_at_its_method():
    assert kernel_parts("numpy_qlora") == ("numpy", "qlora")
    assert kernel_parts("qlora") is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_valid_contract(name):
    contract = FineTuneContract.from_fields(**REQUIRED, **preset_fields(name))
    assert contract.adapter.rank == PRESETS[name]["rank"]


def test_every_name_of_a_preset_in_the_older_system_still_leads_to_one():
    assert all(preset_fields(alias) == PRESETS[name] for alias, name in ALIASES.items())
    with pytest.raises(ContractError, match="one device"):
        preset_fields("distributed")


def test_an_unknown_preset_is_an_error_with_the_nearest_name():
    with pytest.raises(ContractError, match="did you mean 'safe'"):
        preset_fields("save")


def test_rslora_divides_by_the_root_of_the_rank():
    plain = FineTuneContract.from_fields(**REQUIRED, rank=16, alpha=32)
    stable = FineTuneContract.from_fields(**REQUIRED, rank=16, alpha=32, rslora=True)
    assert plain.adapter.scale == 2.0
    assert stable.adapter.scale == 8.0


def test_the_first_pattern_that_is_a_path_or_its_end_gives_its_rank_and_alpha():
    patterns = {"rank_pattern": {"q_proj": 8, r"layers\.0\..*": 2}, "alpha_pattern": {r"layers\.[12]\.x\.q_proj": 4}}
    spec = FineTuneContract.from_fields(**REQUIRED, **patterns, rank=16, alpha=32).adapter
    paths = (
        "model.layers.0.x.q_proj",
        "model.layers.0.x.v_proj",
        "model.layers.1.x.q_proj",
        "model.layers.1.x.seq_proj",
    )
    assert [spec.rank_of(path) for path in paths] == [8, 2, 8, 16]
    assert [spec.scale_of(path) for path in paths] == [4.0, 16.0, 0.5, 2.0]
    assert attrs.evolve(spec, rslora=True).scale_of(paths[2]) == 4 / 8**0.5
    assert (spec.largest_rank, spec.has_patterns) == (16, True)


def test_the_order_of_patterns_is_in_the_digest():
    one = {"q_proj": 8, r"layers\.0\..*": 2}
    first, second = (
        FineTuneContract.from_fields(**REQUIRED, rank_pattern=patterns)
        for patterns in (one, dict(reversed(one.items())))
    )
    assert first.digest({}) != second.digest({})
    assert first == FineTuneContract.from_fields(**REQUIRED, rank_pattern=r"q_proj=8, layers\.0\..*=2")


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        ({"q_proj": 0}, "must have a whole number above 0 for each pattern"),
        ({"q_proj": 2.5}, "must have a whole number above 0 for each pattern"),
        ({"": 2}, "must have a whole number above 0 for each pattern"),
        ({"(a+)+": 2}, "a pattern of the adapter may take for ever"),
        ({"(": 2}, "no regular expression"),
        ("q_proj", "must be patterns with a number each, such as q_proj=8,v_proj=4"),
        (3, "must be patterns with a number each"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, problem):
    with pytest.raises(ContractError, match=problem):
        FineTuneContract.from_fields(**REQUIRED, rank_pattern=patterns)
