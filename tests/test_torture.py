"""A few kills at random moments; ``make torture`` makes two hundred."""

import re
import subprocess
import sys
from pathlib import Path


def test_runs_that_are_killed_end_with_the_bytes_of_one_that_was_not():
    # A process of its own, because one that has computed something cannot be forked any more.
    command = [sys.executable, str(Path(__file__).with_name("torture.py")), "--seed=5", "--only"]
    done = subprocess.run([*command, "torch_lora=7", "jax_lora=1"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.match(
        r"torture: (\d+) kills, (\d+) resumes, (\d+) of (\d+) adapters equal, 0 orphans, \d+ looks .*, 0 faults, ",
        done.stdout.splitlines()[-1],
    )
    killed, resumed, equal, runs = map(int, found.groups())
    assert killed == resumed == 8
    assert equal == runs > 0
