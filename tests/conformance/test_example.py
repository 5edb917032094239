"""The NumPy backend from its own folder, in an environment without any framework: its tests pass, and it trains."""

import json
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/numpy_backend"
FRAMEWORKS = ("torch", "jax", "flax", "optax", "transformers", "bitsandbytes")


def _run(*command, cwd):
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["mens_numpy.hooks", "mens_numpy.offer", "mens_core.testing.conformance"])
def test_there_is_no_framework_and_none_is_needed(empty_environment, tmp_path, module):
    code = f"import {module}, importlib.util as u; print([n for n in {FRAMEWORKS} if u.find_spec(n)])"
    assert _run(empty_environment, "-c", code, cwd=tmp_path) == "[]\n"


def test_its_own_tests_pass(empty_environment, tmp_path):
    told = _run(
        empty_environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", EXAMPLE / "pyproject.toml",
        f"--rootdir={tmp_path}", EXAMPLE / "tests", cwd=tmp_path,
    )  # fmt: skip
    assert " passed" in told
    assert " failed" not in told


@pytest.mark.parametrize(("family", "spelling"), [("gpt2", "numpy"), ("qwen3", "numpy_lora")])
def test_it_trains_through_the_command_line(empty_environment, corpus_dir, model_dirs, tmp_path, family, spelling):
    flags = ["--data-dir", corpus_dir, "--output-dir", tmp_path / "run", "--model", model_dirs[family]]
    flags += ["--tokenizer", "hf", "--epochs", "3", "--lr", "3e-3", "--rank", "4", "--seq-len", "512"]
    _run(empty_environment, "-m", "mens_core", "train", "--backend", spelling, *flags, cwd=tmp_path)
    manifest = json.loads((tmp_path / "run/training_manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "complete"
    assert manifest["execution_kernel"] == "numpy_lora"
    results = manifest["results"]
    assert results["optimizer_steps"] > 0
    assert results["last_loss"] < results["first_loss"]
    assert results["eval_loss_after"] < results["eval_loss_before"]


def test_what_it_cannot_do_is_refused_with_its_reason(empty_environment, corpus_dir, model_dirs, tmp_path):
    flags = ["--data-dir", corpus_dir, "--output-dir", tmp_path / "run", "--model", model_dirs["llama"]]
    command = [empty_environment, "-m", "mens_core", "plan", "--backend", "numpy", "--method", "qlora", *flags]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "NumPy has no NF4 base" in done.stderr
