"""The eval gate: numbers of the run's own files against a policy; what is missing does not pass."""

import json
import shutil

import pytest

import mens_core
from mens_core.cli import main
from mens_core.errors import ContractError, DataError, ModelError
from mens_core.eval_gate.policy import DEFAULT_POLICY, read_policy

GOOD = {
    "supervised_ratio": {"min": 0.01, "block": True},
    "truncation": {"max": 0.0, "block": True},
    "throughput": {"min": 1, "block": True},
    "held_out_loss": {"min_improvement": 0.05, "block": True},
}


@pytest.fixture(scope="module")
def trained(model_dirs, corpus_dir, tmp_path_factory):
    """A short run with held-out rows, some of which have a category."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(corpus_dir, folder / "data")
    rows = [json.loads(line) for line in (corpus_dir / "eval.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"category": "tool_trace" if n else "code"}) + "\n" for n, row in enumerate(rows)]
    (folder / "data" / "eval.jsonl").write_text("".join(lines))
    fields = {"model": str(model_dirs["llama"]), "data_dir": folder / "data", "output_dir": folder / "run"}
    mens_core.Planner().run(**fields, backend="torch", seq_len=512, max_steps=8, learning_rate=1e-2)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def judge(run, policy):
    path = run.parent / "policy.yaml"
    path.write_text(json.dumps(policy))
    code = main(["eval-gate", str(run), "--policy", str(path)])
    receipt = json.loads((run / "eval_gate_receipt.json").read_text())
    assert code == (0 if receipt["passed"] else 1)
    return {gate["gate"]: gate for gate in receipt["gates"]}


def change(run, act):
    path = run / "training_manifest.json"
    manifest = json.loads(path.read_text())
    act(manifest)
    path.write_text(json.dumps(manifest))


def test_a_good_run_passes_and_its_numbers_are_the_manifests(run, capsys):
    gates = judge(run, GOOD)
    assert {gate["verdict"] for gate in gates.values()} == {"passed"}
    results = json.loads((run / "training_manifest.json").read_text())["results"]
    assert gates["held_out_loss"]["found"] == results["eval_loss_before"] - results["eval_loss_after"]
    assert gates["supervised_ratio"]["found"] == results["supervised_tokens_trained"] / results["tokens_trained"]
    assert gates["throughput"]["found"] > 1
    assert "4 gates, 0 failed, 0 warned" in capsys.readouterr().out


def test_the_packages_policy_is_used_where_none_is_given(run):
    assert main(["eval-gate", str(run)]) == 0
    assert json.loads((run / "eval_gate_receipt.json").read_text())["policy"] == str(DEFAULT_POLICY)
    assert [*read_policy().numbers] == [*GOOD]


@pytest.mark.parametrize(
    ("gate", "bound"),
    [
        ("supervised_ratio", {"min": 0.999}),
        ("throughput", {"min": 1e12}),
        ("held_out_loss", {"min_improvement": 100}),
    ],
)
def test_a_gate_that_does_not_hold_blocks_or_warns(run, gate, bound):
    assert judge(run, GOOD | {gate: bound | {"block": True}})[gate]["verdict"] == "failed"
    assert judge(run, GOOD | {gate: bound | {"block": False}})[gate]["verdict"] == "warned"


@pytest.mark.parametrize(
    ("gate", "spoil"),
    [
        ("supervised_ratio", lambda run: change(run, lambda m: m["results"].pop("tokens_trained"))),
        ("truncation", lambda run: change(run, lambda m: m["counters"].pop("rows_truncated"))),
        ("held_out_loss", lambda run: change(run, lambda m: m["results"].pop("eval_loss_before"))),
        ("throughput", lambda run: (run / "telemetry.jsonl").unlink()),
        ("throughput", lambda run: (run / "telemetry.jsonl").write_text('{"event": "step", "tokens_per_sec": 9}\n')),
        ("throughput", lambda run: (run / "telemetry.jsonl").write_text("")),
    ],
)
def test_a_number_that_is_missing_fails(run, gate, spoil):
    spoil(run)
    found = judge(run, GOOD)[gate]
    assert (found["verdict"], found["found"]) == ("failed", None)
    assert "the run does not have it" in found["detail"]


def test_rows_that_their_length_cost_something_are_counted(run):
    change(run, lambda m: m["counters"].update(rows=8, rows_truncated=3, rows_dropped_overlong=2))
    found = judge(run, GOOD)["truncation"]
    assert (found["verdict"], found["found"]) == ("failed", 0.5)


def test_a_context_is_judged_by_its_own_held_out_rows(run):
    policy = {"per_context": {"tool_trace": {"max_loss": 100, "block": True}, "poetry": {"max_loss": 9, "block": True}}}
    gates = judge(run, policy)
    assert gates["per_context tool_trace"]["verdict"] == "passed"
    assert gates["per_context tool_trace"]["detail"] == "3 held-out rows"
    # No row is of it: there is no number, and so it does not hold.
    assert (gates["per_context poetry"]["verdict"], gates["per_context poetry"]["found"]) == ("failed", None)
    policy["per_context"] = {"tool_trace": {"max_loss": 0.001, "block": True}}
    assert judge(run, policy)["per_context tool_trace"]["verdict"] == "failed"


def test_a_suite_is_the_share_of_prompts_that_are_answered_to_the_letter(run):
    answer = mens_core.generate("Write f.", adapter=run, backend="torch", max_new_tokens=5)
    lines = [
        {"prompt": "Write f.", "expected": answer.strip() or "?"},
        {"prompt": "Write f.", "expected": "no one says so"},
    ]
    (run.parent / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite = {"file": "suite.jsonl", "max_new_tokens": 5, "block": True}
    gates = judge(run, {"exact_match": {"half": suite | {"min": 0.5}, "all": suite | {"min": 1}}})
    assert [gate["found"] for gate in gates.values()] == [0.5, 0.5]
    assert [gate["verdict"] for gate in gates.values()] == ["passed", "failed"]
    (run / "adapter_model.safetensors").unlink()
    gone = judge(run, {"exact_match": {"half": suite | {"min": 0.5}}})["exact_match half"]
    assert (gone["verdict"], gone["found"]) == ("failed", None)


@pytest.mark.parametrize("text", ["", "no json\n", '{"prompt": "x"}\n', '{"prompt": "x", "expected": 4}\n'])
def test_a_suite_that_asks_nothing_is_an_error(run, text):
    (run.parent / "suite.jsonl").write_text(text)
    policy = run.parent / "policy.yaml"
    gate = {"file": "suite.jsonl", "min": 0, "max_new_tokens": 5, "block": True}
    policy.write_text(json.dumps({"exact_match": {"s": gate}}))
    with pytest.raises(DataError):
        mens_core.judge_run(run, policy=policy)
    assert not (run / "eval_gate_receipt.json").exists()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"suprvised_ratio": {}}, "did you mean supervised_ratio?"),
        ({"truncation": {"max": 0.5}}, "truncation.block is missing"),
        ({"truncation": {"min": 0.5, "block": True}}, "truncation.min is not a key"),
        ({"truncation": {"max": 50, "block": True}}, "must be a share from 0 to 1"),
        ({"throughput": {"min": True, "block": True}}, "throughput.min must be a number"),
        ({"exact_match": {"s": {"fil": "x"}}}, "exact_match.s.fil is not a key; did you mean file?"),
        ({"per_context": ["x"]}, "per_context must be a mapping"),
        ({}, "lets everything pass"),
    ],
)
def test_a_policy_is_closed(tmp_path, policy, message):
    (tmp_path / "p.yaml").write_text(json.dumps(policy))
    with pytest.raises(ContractError, match="the policy cannot be used") as refused:
        read_policy(tmp_path / "p.yaml")
    assert message in str(refused.value)


def test_a_folder_without_a_run_is_bad_usage(tmp_path, capsys):
    assert main(["eval-gate", str(tmp_path)]) == 2
    assert "training_manifest.json" in capsys.readouterr().err
    with pytest.raises(ModelError):
        mens_core.judge_run(tmp_path)
