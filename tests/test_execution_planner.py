"""The planner: which kernel, refused by which gate, before anything is spent."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest

from mens_core import Planner
from mens_core.choice import _changes
from mens_core.contract import FineTuneContract
from mens_core.costs import COSTS
from mens_core.errors import ContractError, DataError, GateError, ModelError, UnknownBackendError
from mens_core.gates import contract_gates
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import read_layout
from mens_core.machine import this_machine
from mens_core.plan import Speed
from mens_core.random_model import Size, write_random_weights
from mens_core.speeds import store_speed

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A complete Qwen2 folder."""
    return folders.qwen2_folder(tmp_path_factory.mktemp("qwen2") / "m", hidden=8, heads=2, layers=1, vocab=10)


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """The same with the embedding alone."""
    folder = tmp_path_factory.mktemp("partial") / "m"
    return folders.qwen2_folder(folder, hidden=8, heads=2, layers=1, vocab=10, keep={EMBEDDING})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A corpus of six rows."""
    return folders.rows_folder(tmp_path_factory.mktemp("rows") / "d")


@pytest.fixture
def fields(model, rows, tmp_path):
    """A request that can be planned; tests change one thing."""
    return {"model": str(model), "data_dir": rows, "output_dir": tmp_path / "run", "seq_len": 64}


def test_lora_is_planned_on_torch_first(fields):
    plan = Planner().plan(**fields)
    assert (plan.execution_kernel, plan.runbook_kernel, plan.candle_compat_mode) == ("torch_lora", "burn_lora", False)
    assert plan.not_taken["jax_lora"] == "torch_lora comes first and can do the run"
    assert plan.not_taken["torch_qlora"] == "method lora is asked for"


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(("method", "label"), [("lora", "burn_lora"), ("qlora", "candle_qlora")])
def test_every_kernel_can_be_forced_and_names_itself_and_its_label(fields, backend, method, label):
    plan = Planner().plan(**fields, backend=f"{backend}_{method}")
    assert (plan.execution_kernel, plan.runbook_kernel) == (f"{backend}_{method}", label)
    assert plan.candle_compat_mode is (method == "qlora")
    assert len(plan.offers) == 1


def test_a_lora_plan_counts_no_proxy_stack(fields):
    coverage = Planner().plan(**fields, backend="burn_lora").as_dict()
    assert [coverage[f"candle_proxy_stack_{name}"] for name in ("eligible", "complete")] == [False, None]
    assert [coverage[f"candle_proxy_stack_keys_{name}"] for name in ("matched", "expected")] == [None, None]


@pytest.mark.parametrize(("folder", "matched"), [("model", 1), ("partial", 0)])
def test_a_qlora_plan_counts_the_attention_output_projections(fields, request, folder, matched):
    plan = Planner().plan(**{**fields, "model": str(request.getfixturevalue(folder))}, backend="qlora")
    found = plan.as_dict()
    assert found["candle_proxy_stack_eligible"] is True
    assert found["candle_proxy_stack_complete"] is bool(matched)
    assert (found["candle_proxy_stack_keys_matched"], found["candle_proxy_stack_keys_expected"]) == (matched, 1)
    named = any("model.layers.0.self_attn.o_proj.weight" in warning for warning in plan.warnings)
    assert named is not bool(matched)


def _gate(code, **fields):
    contract = FineTuneContract.from_fields(trains=False, **fields)
    return next(gate for gate in contract_gates(contract) if gate.code == code)


EDGE = {"deployment_target": "mobile_edge", "seq_len": 512, "rank": 32, "batch_size": 1, "device": "cpu"}


@pytest.mark.parametrize(
    ("code", "good", "bad"),
    [
        ("nf4_requires_qlora", {"method": "qlora", "base_quant": "nf4"}, {"method": "lora", "base_quant": "nf4"}),
        ("qlora_requires_nf4", {"method": "lora", "base_quant": "none"}, {"method": "qlora", "base_quant": "none"}),
        ("mobile_edge_full_stack", EDGE, EDGE | {"qlora_require_full_proxy_stack": True}),
        ("mobile_edge_seq_len", EDGE, EDGE | {"seq_len": 513}),
        ("mobile_edge_rank", EDGE, EDGE | {"rank": 33}),
        ("mobile_edge_batch_size", EDGE, EDGE | {"batch_size": 2}),
        ("mobile_edge_device", EDGE, EDGE | {"device": "auto"}),
        ("forced_kernel_agrees", {"backend": "torch_lora"}, {"backend": "torch_lora", "method": "qlora"}),
        ("early_stopping_evaluates", {"eval_every": 2, "early_stopping_patience": 1}, {"early_stopping_patience": 1}),
        ("resume_or_overwrite", {"resume": "auto"}, {"resume": "auto", "overwrite": True}),
    ],
)
def test_each_gate_of_a_contract_holds_and_fails_by_one_change(code, good, bad, rows, tmp_path):
    assert _gate(code, **good).passed
    assert not _gate(code, **bad).passed
    with pytest.raises(GateError) as caught:
        Planner().plan(data_dir=rows, output_dir=tmp_path / "run", **bad)
    assert code in caught.value.codes
    assert f"[{code}] not so" in str(caught.value)


def test_nf4_on_a_lora_run_names_the_method_that_has_it():
    with pytest.raises(GateError, match="NF4") as caught:
        Planner().plan(data_dir="d", output_dir="o", base_quant="nf4")
    assert "--backend qlora" in str(caught.value)


def test_a_forced_kernel_that_is_not_the_inferred_one_states_both_with_method_and_storage():
    with pytest.raises(GateError) as caught:
        Planner().plan(data_dir="d", output_dir="o", backend="torch_lora", method="qlora")
    assert "kernel torch_lora, inferred torch_qlora (method qlora, base_quant auto" in str(caught.value)


def test_the_preset_for_small_devices_passes_its_own_gates(fields):
    plan = Planner().plan(preset="mobile_edge", **{**fields, "seq_len": 64})
    assert {gate.code for gate in plan.gates} >= {"mobile_edge_rank", "mobile_edge_device"}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_folder_without_config_json_is_refused_for_want_of_architecture_validation(fields, tmp_path, method):
    (tmp_path / "m").mkdir()
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "model": str(tmp_path / "m")}, method=method, tokenizer="hf")
    assert caught.value.codes == ("config_json_exists",)
    assert "config.json" in str(caught.value)
    assert "architecture validation" in str(caught.value)


def test_an_adapter_given_for_a_base_is_refused(fields, tmp_path):
    folder = folders.qwen2_folder(tmp_path / "m", hidden=8, heads=2, layers=1, vocab=10)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "model": str(folder)})
    assert caught.value.codes == ("base_is_no_adapter",)


def test_a_model_without_a_tokenizer_is_refused_and_a_file_named_apart_serves(fields, tmp_path):
    folder = folders.qwen2_folder(tmp_path / "m", hidden=8, heads=2, layers=1, vocab=10)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "model": str(folder)})
    assert caught.value.codes == ("tokenizer_exists",)
    plan = Planner().plan(**{**fields, "model": str(folder)}, tokenizer_json=tmp_path / "elsewhere.json")
    assert plan.tokenizer_file == tmp_path / "elsewhere.json"
    assert plan.contract_digest == Planner().plan(**fields).contract_digest


def test_the_lab_tokenizer_needs_an_embedding_that_holds_it(fields):
    with pytest.raises(GateError) as caught:
        Planner().plan(**fields, tokenizer="lab")
    assert caught.value.codes == ("lab_tokenizer_fits",)


def test_missing_rows_and_rows_that_are_too_long_are_refused_together(fields, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "data_dir": tmp_path / "empty", "seq_len": 9999})
    assert caught.value.codes == ("train_file_exists", "row_fits_positions")


def test_the_gates_of_a_plan_are_recorded_in_their_order(fields):
    codes = [gate.code for gate in Planner().plan(**fields).gates]
    assert codes == [
        "nf4_requires_qlora",
        "qlora_requires_nf4",
        "forced_kernel_agrees",
        "early_stopping_evaluates",
        "resume_or_overwrite",
        "config_json_exists",
        "base_is_no_adapter",
        "tokenizer_exists",
        "lab_tokenizer_fits",
        "train_file_exists",
        "held_out_file_exists",
        "row_fits_positions",
        "backend_available",
        "fits_memory",
    ]


def test_a_plan_survives_json_and_its_values_know_where_they_come_from(fields):
    plan = Planner().plan(preset="tiny", **{**fields, "seq_len": 64}).as_dict()
    assert json.loads(json.dumps(plan)) == plan
    origins = plan["origins"]
    assert (origins["rank"], origins["seq_len"], origins["seed"]) == ("preset tiny", "call", "default")
    assert (origins["backend"], origins["dtype"], origins["warmup_steps"]) == ("planner", "planner", "preset tiny")
    assert plan["decided"]["backend"] == "torch"
    assert origins.keys() == plan["contract"].keys()


def test_the_digest_does_not_know_where_things_lie_nor_which_backend_may_take_them(fields, tmp_path):
    shutil.copytree(fields["model"], tmp_path / "copy")
    shutil.copytree(fields["data_dir"], tmp_path / "rows")
    elsewhere = {"model": str(tmp_path / "copy"), "data_dir": tmp_path / "rows", "output_dir": tmp_path / "other"}
    here = Planner().plan(**fields)
    assert Planner().plan(**{**fields, **elsewhere}).contract_digest == here.contract_digest
    with (tmp_path / "rows" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "w1", "response": "w2"}\n')
    assert Planner().plan(**{**fields, **elsewhere}).contract_digest != here.contract_digest


def test_both_backends_plan_the_same_run(fields):
    torch, jax = (Planner().plan(**fields, backend=name).as_dict() for name in ("torch", "jax"))
    differing = {name for name in torch if torch[name] != jax[name]}
    assert differing <= {
        "execution_kernel",
        "backend",
        "contract",
        "contract_digest",
        "decided",
        "estimate",
        "limit_bytes",
        "offers",
        "not_taken",
        "gates",
    }


def test_to_compare_every_backend_is_asked_with_every_method_and_the_choice_is_the_same(fields):
    plan = Planner().plan(**fields, compare=True)
    assert {offer.kernel for offer in plan.offers} == {"torch_lora", "jax_lora", "torch_qlora", "jax_qlora"}
    assert plan.execution_kernel == Planner().plan(**fields).execution_kernel


def test_an_architecture_that_nobody_knows_is_refused_with_what_is_known(fields, tmp_path):
    folder = folders.qwen2_folder(tmp_path / "m", hidden=8, heads=2, layers=1, vocab=10)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nosuch"}))
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "model": str(folder)})
    text = str(caught.value)
    assert caught.value.codes == ("backend_available",)
    assert "nosuch" in text
    assert "gpt2, llama, mistral, qwen2" in text
    assert "AutoModelForCausalLM" in text


def test_a_backend_that_does_not_exist_is_never_replaced(fields):
    with pytest.raises(UnknownBackendError, match="torch, jax"):
        Planner().plan(**fields, backend="tensorflow")


def test_planning_writes_nothing(fields, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    Planner().plan(**fields, compare=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_planning_a_known_family_on_a_machine_without_accelerators_loads_no_framework(fields):
    script = (
        "import sys, mens_core\n"
        f"plan = mens_core.Planner().plan(model={fields['model']!r}, data_dir={str(fields['data_dir'])!r}, "
        "output_dir='run', seq_len=64, device='cpu', compare=True)\n"
        "assert len(plan.offers) == 4\n"
        "print(sorted({'torch', 'jax', 'transformers', 'flax', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("fields_changed", "error"),
    [({"rank": 0}, ContractError), ({"model": "./nowhere"}, ModelError), ({"context_filter": "prose"}, DataError)],
)
def test_what_cannot_be_planned_is_an_error_and_no_folder_appears(fields, fields_changed, error):
    with pytest.raises(error):
        Planner().run(**{**fields, **fields_changed})
    assert not Path(fields["output_dir"]).exists()


def test_a_folder_of_400_gigabytes_is_planned_in_under_a_second_and_a_tenth_of_a_gigabyte(rows, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(folders.LLAMA_70B))
    specs = {name: ("BF16", shape) for name, shape in tensor_shapes(read_layout(folder)).items()}
    held = 2 * sum(math.prod(shape) for _, shape in specs.values())
    folders.write_shards(folder, specs | {"padding": ("U8", (400_000_000_000 - held,))}, 100)
    folders.word_level(folder / "tokenizer.json", 100)
    script = (
        "import json, resource, sys, time, mens_core, mens_core.machine\n"
        "mens_core.machine._memory = lambda: 1 << 50  # a machine on which it fits\n"
        "planner, start = mens_core.Planner(), time.perf_counter()\n"
        "plan = planner.plan(model=sys.argv[1], data_dir=sys.argv[2], output_dir='run', seq_len=64, device='cpu',"
        " backend='qlora')\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, plan.as_dict()]))"
    )
    # The kernel counts the peak of the process that forks as the child's; a shell in between is small.
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", script, str(folder), str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, kilobytes, plan = json.loads(done.stdout)
    assert (plan["parameters"], plan["stored_bytes"]) == (held // 2, 400_000_000_000)
    assert (plan["candle_proxy_stack_keys_matched"], plan["candle_proxy_stack_keys_expected"]) == (80, 80)
    # The padding is no tensor of the model, and the plan says so.
    assert [verdict["code"] for verdict in plan["preflight"] if not verdict["passed"]] == ["tensors_known"]
    assert seconds < 1
    assert kilobytes < 100_000


def _peak(plan):
    return plan.offer.peak_bytes


def test_a_run_that_does_not_fit_the_memory_is_refused_with_changes_that_make_it_fit(corpus_dir, model_dirs, tmp_path):
    fields = {"model": str(model_dirs["llama"]), "data_dir": corpus_dir, "output_dir": tmp_path / "run"}
    fields |= {"batch_size": 64, "grad_accum": 1, "rank": 64, "device": "cpu"}
    plan = Planner().plan(**fields, backend="torch_lora")
    least = _peak(Planner().plan(**fields | {"batch_size": 1}, backend="torch_lora"))
    limit = (least + 2 * _peak(plan)) // 3
    with pytest.raises(GateError) as caught:
        Planner().plan(**fields, backend="torch_lora", max_memory=limit)
    assert caught.value.codes == ("fits_memory",)
    text = str(caught.value)
    assert "torch_lora needs" in text
    assert all(part in text for part in ("framework", "activations"))
    ways = [line.strip() for line in text.splitlines() if line.strip().startswith("--")]
    assert len(ways) == 3
    assert ways[0].startswith("--batch-size ")
    # None of them only adds to another one.
    assert not any(set(one.split()[:-1]) < set(other.split()[:-1]) for one in ways for other in ways)
    for way in ways:
        changed = {"backend": "torch_lora", **fields, **_fields_of(way.partition("  (")[0])}
        assert _peak(Planner().plan(**changed, max_memory=limit)) <= limit


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_deep_model_that_does_not_fit_is_offered_layers_that_are_computed_again(corpus_dir, tmp_path, backend):
    size = Size(width=128, layers=16, heads=4, kv_heads=4, head_dim=32, inner=512, positions=512)
    (tmp_path / "deep").mkdir()
    write_random_weights(tmp_path / "deep", arch="gpt2", size=size, vocab_size=300)
    fields = {"model": str(tmp_path / "deep"), "tokenizer": "lab", "seq_len": 512, "batch_size": 16, "grad_accum": 1}
    fields |= {"data_dir": corpus_dir, "output_dir": tmp_path / "run", "backend": f"{backend}_lora", "device": "cpu"}
    plans = [Planner().plan(**fields, gradient_checkpointing=again) for again in (False, True)]
    assert plans[0].offer.seconds_per_step < plans[1].offer.seconds_per_step
    with pytest.raises(GateError) as caught:
        Planner().plan(**fields, max_memory=_peak(plans[1]))
    ways = [line.strip() for line in str(caught.value).splitlines() if line.strip().startswith("--")]
    assert any(way.startswith("--gradient-checkpointing  (") for way in ways)


def test_what_a_run_asks_for_already_is_not_offered_to_it():
    offered = [
        _changes(FineTuneContract.from_fields(trains=False, gradient_checkpointing=again), "torch")
        for again in (False, True)
    ]
    assert [flags for flags in offered[0] if flags not in offered[1]] == ["--gradient-checkpointing"]


def _fields_of(flags):
    """Flags of the command line → fields; one without a value is a switch."""
    given = [flag.split() for flag in flags.split("--") if flag]
    values = {name.replace("-", "_"): value[0] if value else True for name, *value in given}
    return {name: int(value) if str(value).isdigit() else value for name, value in values.items()}


def test_a_limit_that_nothing_meets_says_so(fields):
    with pytest.raises(GateError, match="a smaller model, or a machine with more memory"):
        Planner().plan(**fields, max_memory="1MB")


def test_a_backend_too_large_for_the_memory_gives_way_to_one_that_fits_unless_it_was_named(fields):
    sizes = {name: _peak(Planner().plan(**fields, backend=name)) for name in ("torch", "jax")}
    assert sizes["torch"] < sizes["jax"]
    plan = Planner().plan(**fields, compare=True, max_memory=(sizes["torch"] + sizes["jax"]) // 2)
    assert plan.execution_kernel == "torch_lora"
    assert plan.not_taken["jax_lora"].startswith("needs ")
    with pytest.raises(GateError, match="jax_lora needs"):
        Planner().plan(**fields, backend="jax", max_memory=sizes["torch"])


def test_a_share_of_the_memory_is_a_limit_too(fields):
    plan = Planner().plan(**fields)
    half = Planner().plan(**fields, max_vram_fraction=0.5)
    assert half.limit_bytes == pytest.approx(plan.limit_bytes / 2, abs=1)
    assert half.decided["max_memory"] == half.limit_bytes


def test_the_estimate_is_the_offers(fields):
    plan = Planner().plan(**fields, batch_size=2, grad_accum=2, epochs=2)
    estimate, work = plan.estimate(), plan.workload
    assert estimate["peak_memory_bytes"] == sum(plan.offer.memory.values())
    assert estimate["tokens_per_sec"] == pytest.approx(work.tokens / plan.offer.seconds_per_step)
    assert estimate["train_seconds"] == pytest.approx(work.steps * plan.offer.seconds_per_step)
    # Six rows in batches of two, two batches a step, twice.
    assert (work.rows, work.steps, work.batches) == (6, 4, 1.5)


def test_a_speed_that_is_not_used_is_a_warning_of_the_plan_whose_kernel_it_is(fields, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    speed = Speed(seconds=dict.fromkeys(COSTS, 1e-9), source="measured in a test")
    store_speed("torch_lora cpu float32", speed, this_machine())
    used = Planner().plan(**fields)
    assert (used.offer.seconds_source, used.warnings) == ("measured in a test", ())
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    plan = Planner().plan(**fields)
    assert "table" in plan.offer.seconds_source
    assert any("another threads" in warning for warning in plan.warnings)
    assert Planner().plan(**fields, backend="jax").warnings == ()


def test_rows_that_a_sample_does_not_show_are_planned_all_the_same(fields, tmp_path):
    data = tmp_path / "rare"
    data.mkdir()
    common = json.dumps({"prompt": "w1 w2", "response": "w3 w4", "category": "common"}) + "\n"
    rare = json.dumps({"prompt": "w1", "response": "w2 w3", "category": "rare"}) + "\n"
    (data / "train.jsonl").write_text(common * 701 + rare + common * 698)
    plan = Planner().plan(**{**fields, "data_dir": data}, context_filter="rare")
    assert plan.workload.rows == 1
    assert plan.workload.source == "all rows"
    with pytest.raises(DataError, match="no row is left"):
        Planner().plan(**{**fields, "data_dir": data}, context_filter="none such")
