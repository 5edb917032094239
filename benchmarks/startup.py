"""How long until a command answers: ``--help`` against an empty interpreter, a plan against importing torch.

    python benchmarks/startup.py [--rounds 9]

Each in a fresh process on one core, in turns; CPU seconds of the process and what it starts. Modules lie compiled
beside their source, as pip leaves them, whatever the environment says of that: the uncounted turn writes them.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import figures


def main() -> None:
    """One line a claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    figures.one_core()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "train.jsonl"
        rows.write_text('{"prompt": "What is it?", "response": "It is a row."}\n' * 64, encoding="utf-8")
        plan = ["-m", "mens_core", "plan", "--data-dir", folder, "--output-dir", f"{folder}/run", "--seq-len", "128"]
        commands = {
            "pass": ["-c", "pass"],
            "help": ["-m", "mens_core", "--help"],
            "torch": ["-c", "import torch"],
            "plan": plan,
        }
        variants = {name: lambda words=words: run(words) for name, words in commands.items()}
        spent = figures.in_turns(variants, asked.rounds, children)
    figures.state(13, "python -m mens_core --help", spent["help"], spent["pass"], "python -c pass, time", "<= 3.0")
    figures.state(13, "a plan of a local folder", spent["plan"], spent["torch"], "import torch, time", "<= 0.3")


def run(words: list[str]) -> None:
    """Raises CalledProcessError if the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
