"""The gate: what shows nothing does not pass, and the receipt says what ran."""

import json
from pathlib import Path

import jsonschema
import pytest

import mens_core
from mens_core.acceptance.checks import CHECKS
from mens_core.acceptance.gate import RECEIPT_SCHEMA
from mens_core.acceptance.profiles import PROFILES, read_profiles
from mens_core.cli import main
from mens_core.errors import ContractError

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads(RECEIPT_SCHEMA.read_text())

TESTS = """
import warnings
import pytest
def test_good(record_property): record_property("error", 1.5e-7)
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.xfail
def test_expected_to_fail(): assert False
@pytest.mark.xfail(strict=False)
def test_lucky(): pass
def test_warning(): warnings.warn("old")
def test_dying(): import os; os._exit(3)
@pytest.fixture
def broken_end(): yield; assert False
def test_broken_end(broken_end): pass
def test_late_skip(): pytest.skip("no device")
"""


@pytest.fixture
def gate(tmp_path):
    """Run a gate of steps that select from ``TESTS``, and check its receipt against the schema."""
    (tmp_path / "test_rows.py").write_text(TESTS)

    def run(*keywords, keep_going=False, **more):
        steps = {f"s{n}_{word}": _tests("test_rows.py", word) for n, word in enumerate(keywords)} | more
        (tmp_path / "steps.yaml").write_text(json.dumps({"steps": steps, "profiles": {"p": [*steps]}}))
        receipt = tmp_path / "receipt.json"
        words = ["--profile=p", f"--profiles={tmp_path / 'steps.yaml'}", f"--receipt={receipt}"]
        code = main(["gate", *words, *(["--keep-going"] if keep_going else [])])
        found = json.loads(receipt.read_text())
        jsonschema.validate(found, SCHEMA)
        assert code == (0 if found["passed"] else 1)
        return found

    return run


def _tests(file, keyword=None):
    return {"rows": ["1"], "part": "M1", "tests": {"file": file} | ({"keyword": keyword} if keyword else {})}


def test_a_step_that_passes_has_its_numbers_in_the_receipt(gate, capsys):
    found = gate("good")
    (step,) = found["steps"]
    assert (step["verdict"], step["collected"], step["passed"], step["skipped"]) == ("passed", 1, 1, 0)
    assert step["measured"] == {"test_good": {"error": 1.5e-7}}
    assert step["commands"][0].startswith("python -m pytest ")
    assert found["versions"]["mens-core"]
    assert found["machine"]["cpu_count"] >= 1
    shown = capsys.readouterr().out
    assert "passed   s0_good" in shown
    assert "p: 1 steps, all passed" in shown


@pytest.mark.parametrize(
    ("keyword", "reason"),
    [
        ("no_such_test", "no test was collected"),
        ("bad", "1 failed: test_rows.py::test_bad"),
        ("test_skipped", "1 skipped, and what is skipped shows nothing"),
        ("late_skip", "1 skipped"),
        ("expected_to_fail", "1 skipped"),
        ("lucky", "1 skipped"),
        ("warning", "1 failed"),
        ("broken_end", "1 failed"),
        ("dying", "pytest ended with code 3 and left no record"),
    ],
)
def test_a_step_that_shows_nothing_fails_and_says_why(gate, keyword, reason):
    (step,) = gate(keyword)["steps"]
    assert step["verdict"] == "failed"
    assert reason in step["reason"]


def test_a_step_that_lost_its_file_fails(gate):
    found = gate(gone=_tests("test_gone.py"))
    assert "the file of its tests is missing" in found["steps"][0]["reason"]


@pytest.mark.parametrize(
    "text", ["import nothing_of_that_name", "import pytest; pytest.skip('x', allow_module_level=True)"]
)
def test_a_step_whose_file_cannot_be_collected_fails(gate, tmp_path, text):
    (tmp_path / "test_broken.py").write_text(text)
    (step,) = gate(broken=_tests("test_broken.py"))["steps"]
    assert step["verdict"] == "failed"
    assert "as a whole" in step["reason"]


def test_the_first_failure_stops_the_gate_unless_it_is_to_keep_going(gate):
    verdicts = [step["verdict"] for step in gate("good", "bad", "good")["steps"]]
    assert verdicts == ["passed", "failed", "not run"]
    verdicts = [step["verdict"] for step in gate("good", "bad", "good", keep_going=True)["steps"]]
    assert verdicts == ["passed", "failed", "passed"]


def test_a_step_of_commands_is_judged_by_what_they_left(gate, monkeypatch):
    step = {"rows": ["11"], "part": "runs", "commands": [["presets"]], "check": "lora_row"}
    (found,) = gate(run=step)["steps"]
    # The command ended well, and there is no run.
    assert found["verdict"] == "failed"
    assert "what was to be checked cannot be read" in found["reason"]
    (found,) = gate(run=step | {"commands": [["verify", "nothing"]]})["steps"]
    assert found["reason"] == "'verify' ended with code 2"
    assert "training_manifest.json" in found["output"]
    monkeypatch.setitem(CHECKS, "lora_row", lambda _folder, _outputs: ([], {}))
    assert gate(run=step)["steps"][0]["reason"] == "nothing was checked"
    monkeypatch.setitem(CHECKS, "lora_row", lambda _folder, _outputs: ([("so", True, "1")], {"n": 1}))
    assert gate(run=step)["passed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["steps"]["a"].update(row=["1"]), "steps.a.row is not a key; did you mean rows?"),
        (
            lambda c: c["steps"]["a"]["tests"].update(keywrd="x"),
            "steps.a.tests.keywrd is not a key; did you mean keyword?",
        ),
        (lambda c: c["steps"]["a"].pop("tests"), "must have tests or commands"),
        (lambda c: c["steps"]["a"].update(rows=[]), "steps.a.rows must be a list of rows"),
        (lambda c: c["steps"]["a"].update(rows=[1]), "steps.a.rows must be a list of rows"),
        (lambda c: c["steps"]["a"].update(check="lora_row"), "only commands have one"),
        (
            lambda c: c["steps"].update(b={"rows": ["1"], "part": "M1", "commands": [["x"]]}),
            "steps.b must say with check",
        ),
        (lambda c: c["profiles"].update(p=["aa"]), "there is no step aa; did you mean a?"),
        (lambda c: c["profiles"].update(p=["a", "a"]), "has a twice"),
        (lambda c: c.update(profile={}), "profile is not a key; did you mean profiles?"),
        (lambda c: c.update(profiles={}), "profiles must be a mapping of at least one name"),
    ],
)
def test_a_file_of_steps_is_closed(tmp_path, change, message):
    content = {"steps": {"a": _tests("x.py")}, "profiles": {"p": ["a"]}}
    change(content)
    (tmp_path / "steps.yaml").write_text(json.dumps(content))
    with pytest.raises(ContractError, match="cannot be used") as refused:
        read_profiles(tmp_path / "steps.yaml")
    assert message in str(refused.value)


def test_words_that_make_no_sense_are_bad_usage(tmp_path, capsys):
    assert main(["gate", "--profile", "m1m5", "--receipt", str(tmp_path / "r.json")]) == 2
    assert "did you mean m1m4?" in capsys.readouterr().err
    assert main(["gate", "--receipt", str(tmp_path / "none" / "r.json")]) == 2
    assert "the receipt's folder does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["mens-gate"], ["ci", "mens-gate"]])
def test_the_runbooks_names_of_the_gate_are_the_gate(words, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        mens_core, "run_gate", lambda profile, **_: calls.append(profile) or {"passed": True}, raising=False
    )
    assert main([*words, "--profile", "m1m4", "--json", "--receipt", str(tmp_path / "r.json")]) == 0
    assert calls == ["m1m4"]
    assert json.loads(capsys.readouterr().out) == {"passed": True}


def test_every_row_and_sign_off_has_a_step_and_every_file_of_tests_a_step():
    profiles = read_profiles()
    assert list(profiles) == ["m1m4", "training", "ci_full"]
    rows = {row for step in profiles["ci_full"] for row in step.rows}
    assert rows == {"1a", "1b", "1c", "1d", *map(str, range(2, 14)), "S1", "S2", "S3"}
    files = {step.file for step in profiles["ci_full"] if step.file}
    assert files == set(PROFILES.parent.glob("test_*.py"))
    assert {step.part for step in profiles["m1m4"]} == {"M1", "M2", "M3", "M4"}
    assert set(profiles["m1m4"]) | set(profiles["training"]) <= set(profiles["ci_full"])
