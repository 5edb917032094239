"""The gate and its tests come with the package: they run where there is no clone."""

import json
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mens_core"


def _run(python, folder, *words):
    return subprocess.run([python, "-m", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_an_installed_package_has_the_gate_its_tests_and_its_data(empty_environment, tmp_path):
    code = "import mens_core; print(mens_core.__path__[0])"
    found = subprocess.run([empty_environment, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    installed = Path(found.stdout.strip())
    assert installed != PACKAGE
    files = [file for part in ("acceptance", "eval_gate", "testing") for file in (PACKAGE / part).rglob("*.*")]
    ours = {file.relative_to(PACKAGE) for file in files if file.is_file() and "__pycache__" not in file.parts}
    assert {Path("testing/acceptance/golden_nf4.json"), Path("acceptance/receipt_schema.json")} <= ours
    assert all((installed / file).is_file() for file in ours)


def test_rows_that_need_no_backend_pass_there_and_the_others_fail_the_gate(empty_environment, tmp_path):
    words = ("--pyargs", "mens_core.testing.acceptance", "-p", "no:cacheprovider", "-k", "training_text")
    done = _run(empty_environment, tmp_path, "pytest", *words)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    done = _run(empty_environment, tmp_path, "mens_core", "gate", "--profile", "m1m4")
    assert done.returncode == 1
    receipt = json.loads((tmp_path / "gate_receipt.json").read_text())
    assert receipt["steps"][0]["verdict"] == "failed"
    assert {step["verdict"] for step in receipt["steps"][1:]} == {"not run"}
    assert receipt["source"] == {"commit": None, "dirty": None}
