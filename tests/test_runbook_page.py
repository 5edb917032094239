"""docs/runbook.md is executed: every command in its table is collected, or is a command of the gate."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mens_core.acceptance.profiles import read_profiles
from mens_core.acceptance.steps import not_run

PAGE = Path(__file__).parents[1] / "docs" / "runbook.md"
ROWS = ["1a", "1b", "1c", "1d", *map(str, range(2, 14)), "S1", "S2", "S3"]
TESTS, VERB = "python -m pytest ", "python -m mens_core "

# Collects what each list of words selects, in one process: file → how many.
_COLLECT = """
import collections, contextlib, io, json, sys, pytest
class Seen:
    def pytest_collection_finish(self, session):
        self.files = collections.Counter(item.path.name for item in session.items)
found = {}
for command in json.loads(sys.argv[1]):
    seen = Seen()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*command[3:], "--collect-only", "-p", "no:cacheprovider"], plugins=[seen])
    found[" ".join(command)] = seen.files
print(json.dumps(found))
"""


def rows_of(page):
    """Row → (commands, files of tests), out of the page's table."""
    table = page.partition("## The rows\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    return {
        cells[0].strip(): (re.findall(r"`(python [^`]*)`", cells[2]), re.findall(r"`(test_\w+\.py)`", cells[3]))
        for cells in lines[2:]
    }


_selected = {}


def collected(commands, folder):
    """Command → file → number of tests it selects; each is collected once."""
    words = [shlex.split(command) for command in commands if command not in _selected]
    if words:
        child = [sys.executable, "-c", _COLLECT, json.dumps(words)]
        done = subprocess.run(child, cwd=folder, check=True, capture_output=True, text=True)
        _selected.update(json.loads(done.stdout.splitlines()[-1]))
    return _selected


def problems(page, folder):
    """What does not hold of the page's table."""
    rows, steps = rows_of(page), read_profiles()
    found = [] if [*rows] == ROWS else [f"the rows are {', '.join(rows)}"]
    tests = [command for commands, _ in rows.values() for command in commands if command.startswith(TESTS)]
    selected = collected(tests, folder)
    for row, (commands, files) in rows.items():
        of_gate = {command for step in steps["ci_full"] if row in step.rows for command in not_run(step).commands}
        known = {step.file.name for step in steps["ci_full"] if step.file and row in step.rows}
        found += [] if commands else [f"{row}: no command"]
        found += [f"{row}: {name} is no file of the gate's step" for name in set(files) ^ known]
        for command in commands:
            if command.startswith(TESTS):
                chosen = selected[" ".join(shlex.split(command))]
                found += [] if chosen else [f"{row}: nothing is collected by {command}"]
                found += [f"{row}: {name} is not listed" for name in set(chosen) - set(files)]
            elif command.startswith(f"{VERB}ci mens-gate --profile "):
                found += [] if command.split()[-1] in steps else [f"{row}: no such profile in {command}"]
            elif command not in of_gate:
                found.append(f"{row}: the gate does not run {command}")
        runs = [command for command in commands if command.startswith(VERB) and "mens-gate" not in command]
        left = {command for command in of_gate if command.startswith(VERB)} - set(runs)
        found += [f"{row}: the gate also runs {command}" for command in left]
    return found


def test_every_command_of_the_table_is_collected_or_run_by_the_gate(tmp_path):
    assert problems(PAGE.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("-k f32_matmul_parity", "-k f32_matmul_parities", "5: nothing is collected"),
        ("`test_row_9_warmup.py`", "`test_row_8_warmup.py`", "9: test_row_8_warmup.py is no file"),
        ("| 7 |", "| 77 |", "the rows are"),
        ("--profile m1m4`<br>", "--profile m1m5`<br>", "13: no such profile"),
        ("--arch qwen2 --output model", "--arch qwen3 --output model", "12: the gate does not run"),
        ("python -m mens_core verify run", "verify", "11: the gate also runs python -m mens_core verify run"),
    ],
)
def test_a_table_that_is_wrong_is_found_out(tmp_path, old, new, problem):
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("## The rows\n")[2]
    assert old in table
    wrong = page.replace(table, table.replace(old, new))
    assert any(line.startswith(problem) for line in problems(wrong, tmp_path))
