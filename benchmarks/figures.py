"""What the benchmarks share: taking turns, ratios round by round, and the figures they state.

A figure is one claim: how many times as fast, or as large, one thing is as another, beside what it was meant to be.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mens_torch._processor import multiplies_bfloat16

# An allocator that keeps its pages: page faults of fresh memory otherwise flatter whoever allocates less.
KEPT = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "pages kept": {"GLIBC_TUNABLES": KEPT}}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "HF_HUB_OFFLINE": "1",
}
# A file that every figure is added to, a line each; ``suite`` names it.
COLLECTED = "MENS_FIGURES"

Variants = Mapping[str, Callable[[], object]]


def one_core() -> None:
    """Stay on one core, by which every library then counts its threads.

    Raises:
        SystemExit: if one of them is there already: two threads of it would wait for each other on that core.
    """
    early = {"torch", "jax", "numpy"} & sys.modules.keys()
    if early and not os.environ.items() >= ONE_THREAD.items():
        raise SystemExit(f"{', '.join(sorted(early))} came before the choice of one core")
    os.environ.update(ONE_THREAD)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def format_here(dtype: str) -> str:
    """The format measured for it: float32 where this processor does not multiply bfloat16, and peers take minutes."""
    return dtype if dtype != "bfloat16" or multiplies_bfloat16() else "float32"


def in_turns(
    variants: Variants, rounds: int, clock: Callable[[], float] = time.process_time, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; a round runs all of them, each time beginning with another.

    Every variant runs once before the rounds, uncounted, but where all of them are ``warm`` from before.
    """
    names, spent = list(variants), {name: list[float]() for name in variants}
    for turn in range(0 if warm else -1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = clock()
            variants[name]()
            if turn >= 0:
                spent[name].append(clock() - begun)
    return spent


def state(
    row: int | str,
    what: str,
    above: Sequence[float],
    below: Sequence[float],
    against: str,
    goal: str = "",
    allocator: str = "default",
) -> None:
    """Say ``above / below``, round by round: the median, the least and the most of it.

    Args:
        row: of the table of goals, or a word.
        what: the thing measured.
        above: seconds or bytes of each round.
        below: of the same rounds.
        against: the thing it is measured by.
        goal: ``>= 2.5`` or ``<= 0.15``; empty where there is none.
        allocator: one of ``ALLOCATORS``.
    """
    found = sorted(one / other for one, other in zip(above, below, strict=True))
    middle = statistics.median(found)
    figure = {
        "row": row,
        "what": what,
        "against": against,
        "allocator": allocator,
        "ratio": middle,
        "least": found[0],
        "most": found[-1],
        "rounds": len(found),
        "goal": goal,
        "reached": reached(middle, goal),
    }
    verdict = "" if not goal else f", goal {goal}: {'reached' if figure['reached'] else 'NOT REACHED'}"
    kept = "" if allocator == "default" else f" ({allocator})"
    print(
        f"FIGURE row {row}, {what}{kept}: {middle:.2f} x {against} [{found[0]:.2f}, {found[-1]:.2f}]{verdict}",
        flush=True,
    )
    if COLLECTED in os.environ:
        with Path(os.environ[COLLECTED]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figure) + "\n")


def reached(ratio: float, goal: str) -> bool | None:
    """Whether a ratio is what it was meant to be; None without a goal."""
    if not goal:
        return None
    sign, bound = goal.split()
    return ratio >= float(bound) if sign == ">=" else ratio <= float(bound)


def in_child(script: str, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a script of this folder in a process of its own; its last line of output, the rest is shown.

    Raises:
        SystemExit: if it fails.
    """
    command = [sys.executable, script, *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD, **(environment or {})}
    )
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line.rstrip("\n"))
        if line.startswith(("FIGURE", "  ")):
            print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"{Path(script).name} {' '.join(words)} ended with {process.returncode}")
    return lines[-1] if lines else ""


def private_peak(work: Callable[[], object]) -> float:
    """MiB of private memory, without mapped files, that work takes above what is there; looked at every 2 ms."""
    before, seen, done = resident("RssAnon"), [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.append(resident("RssAnon"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(seen) - before


def forget_peak() -> float:
    """Start the mark of the highest memory anew; MiB resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def resident(field: str) -> float:
    """MiB, as Linux counts them: ``VmRSS`` now, ``VmHWM`` the most since ``forget_peak``, ``RssAnon`` without files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024
