"""The examples run, with fewer steps, and end as they say."""

import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

LIBRARY = Path(sysconfig.get_path("stdlib"))
EXAMPLES = Path(__file__).parents[1] / "examples"


def _main(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_every_example_is_run_here_and_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert all(f"`{name}`" in table for name in scripts)
    run = Path(__file__).read_text(encoding="utf-8")
    assert all(f'_main("{name}")' in run for name in scripts)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where nothing else is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "example"


def test_the_quickstart_lowers_the_held_out_loss(folder, capsys):
    before, after = _main("01_quickstart.py")(folder, steps=24, source=LIBRARY / "email", eval_fraction=0.05)
    assert after < before
    assert "--- after" in capsys.readouterr().out


def test_qlora_takes_an_eighth_of_the_base_and_learns(folder, capsys):
    losses = list(_main("02_qlora.py")(folder, steps=24).values())
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]
    assert "merged in" in capsys.readouterr().out


def test_two_backends_are_one_curve(folder):
    # In a process whose JAX compiles as a user's does, with the passes that the tests do without.
    code = "import sys, pathlib, test_examples as here; folder = pathlib.Path(sys.argv[1])\n"
    code += 'print(here._main("03_two_backends.py")(folder, steps=6))'
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The bound of the example's own words.
    assert float(done.stdout.splitlines()[-1]) < 1e-4
    assert (folder / "two_backends.png").stat().st_size > 10_000


def test_transformers_opens_what_was_merged_and_finds_what_peft_finds(folder):
    assert _main("04_merge_and_use.py")(folder, steps=6) < 1e-4


def test_traces_are_mixed_trained_and_asked_for(folder, capsys):
    answers = _main("05_tool_traces.py")(folder, steps=6)
    assert len(answers) == 2
    assert "loss" in capsys.readouterr().out
