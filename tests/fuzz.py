"""``make fuzz``: the parsers of ``parsers.py`` for ten minutes, or FUZZ_SECONDS; prints counts, ends at a finding."""

import os
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from parsers import PARSERS, check

_ROUND = 2000


def fuzz(name, seconds):
    """Hold one parser to its property for a while; returns (inputs, of which it took)."""
    inputs, file, read = PARSERS[name]
    counts, ends = [0, 0], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < ends:

            @seed(time.time_ns())
            @settings(
                max_examples=_ROUND,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.target, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(inputs)
            def one(raw):
                if time.monotonic() < ends:
                    counts[0] += 1
                    counts[1] += check(read, Path(folder) / file, raw)

            one()
    return counts


def main():
    """Fuzz each parser for its share of the time."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "600")) / len(PARSERS)
    for name in PARSERS:
        tried, taken = fuzz(name, seconds)
        sys.stdout.write(f"{name}: {tried:,} inputs in {seconds:.0f} s, {taken:,} taken, the others refused\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
