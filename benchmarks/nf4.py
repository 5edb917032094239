"""NF4 on the CPU against bitsandbytes and against memory itself: storing, bringing back, and what it costs a JAX step.

    make bench-nf4     or     python benchmarks/nf4.py [--rounds 9] [--step-rounds 3] [--threads 1,2]

Weights of normal numbers, blocks of 64; what is brought back is larger in bfloat16 than any cache, or ``fill`` would
write into that instead of into memory. Variants take turns, in rotated order, in processes of their own:
with glibc's own allocator and with one that keeps its pages, since page faults of fresh memory otherwise decide. One
thread is measured in the process's CPU time on one core, several in wall time. ``fill`` writes one number into memory
of the same size that is there already, ``copy`` copies the float32 weight. The bytes must be bitsandbytes' or nothing
is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import figures

STORED = (4096, 4096)
BROUGHT_BACK = (8192, 8192)

Variants = dict[str, Callable[[], object]]


def main() -> None:
    """Run each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-rounds", type=int, default=3)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--part", choices=("bytes", "step", "first"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"bytes": _bytes, "step": _step, "first": _first}[arguments.part](arguments)
        return
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "numba", "jax")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for what in ("compiled", "from its cache"):
            print(f"first weight, {what}: ", end="", flush=True)
            _child(arguments, "first", {"NUMBA_CACHE_DIR": folder})
    for threads in arguments.threads.split(","):
        for allocator, setting in figures.ALLOCATORS.items():
            print(f"threads {threads}, allocator {allocator}", flush=True)
            _child(arguments, "bytes", {"OMP_NUM_THREADS": threads, **setting})
    if arguments.step_rounds:
        _child(arguments, "step", {"OMP_NUM_THREADS": "1"})


def _child(arguments: argparse.Namespace, part: str, environment: Mapping[str, str]) -> None:
    numbers = ["--rounds", str(arguments.rounds), "--step-rounds", str(arguments.step_rounds)]
    command = [sys.executable, __file__, "--part", part, *numbers]
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def _first(_: argparse.Namespace) -> None:
    """Seconds until the first weight is stored, of a process that has NumPy."""
    import numpy as np

    from mens_core import nf4
    from mens_core.exchange import NF4Spec

    begun = time.perf_counter()
    nf4.quantize(np.ones((64, 64), np.float32), NF4Spec(), 1)
    print(f"{time.perf_counter() - begun:.2f} s")


def _bytes(arguments: argparse.Namespace) -> None:
    """Storing and bringing back; CPU seconds of one core, or wall seconds of several."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch
    from mens_torch import quant
    from mens_torch._bitsandbytes import library

    from mens_core.exchange import NF4Spec

    torch.set_num_threads(threads)
    weight = torch.randn(STORED, generator=torch.Generator().manual_seed(0)) * 0.02
    clock = time.process_time if threads == 1 else time.perf_counter
    reused = torch.empty_like(weight)
    for double in (False, True):
        spec = NF4Spec(block_size=64, double_quant=double)
        theirs = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
        stored, (codes, state) = quant.quantize(weight, spec), library().quantize_4bit(weight, **theirs)
        if not torch.equal(stored.codes, codes.reshape(-1)):
            raise SystemExit("the codes are not bitsandbytes', so there is nothing to compare")
        storing: Variants = {
            "bitsandbytes": lambda theirs=theirs: library().quantize_4bit(weight, **theirs),
            "ours": lambda spec=spec: quant.quantize(weight, spec),
            "copy": lambda: reused.copy_(weight),
        }
        ratios = [("ours", "bitsandbytes")]
        _compare(f"store{' twice' * double}", STORED, storing, arguments.rounds, clock, ratios)
    weight = weight.repeat(BROUGHT_BACK[0] // STORED[0], BROUGHT_BACK[1] // STORED[1])
    codes, state = library().quantize_4bit(weight, **theirs)
    stored, plain = (quant.quantize(weight, NF4Spec(double_quant=double)) for double in (True, False))
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        place = torch.empty(weight.numel(), dtype=dtype)
        back: Variants = {
            "bitsandbytes": lambda: library().dequantize_4bit(codes, state),
            "ours": lambda place=place: stored.write(place),
            "ours, plain scales": lambda place=place: plain.write(place),
            "ours, new memory": lambda dtype=dtype: quant.dequantize(stored, dtype),
            "fill": lambda place=place: place.fill_(1.0),
        }
        ratios = [("ours", "bitsandbytes"), ("ours", "fill"), ("ours, plain scales", "fill")]
        what = f"bring back {dtype}".replace("torch.", "")
        _compare(what, BROUGHT_BACK, back, arguments.rounds, clock, ratios)


def _compare(
    what: str,
    shape: tuple[int, int],
    variants: Variants,
    rounds: int,
    clock: Callable[[], float],
    ratios: Sequence[tuple[str, str]],
) -> None:
    """Take turns and print billions of weights a second, and how many times faster one is than the other."""
    spent = figures.in_turns(variants, rounds, clock)
    numbers = shape[0] * shape[1] / 1e9
    speeds = ", ".join(f"{name} {numbers / statistics.median(spent[name]):.2f}" for name in variants)
    print(f"  {what}, 1e9 weights/s: {speeds}")
    for own, base in ratios:
        found = sorted(b / o for b, o in zip(spent[base], spent[own], strict=True))
        print(
            f"  FIGURE nf4 {what}: {own} {statistics.median(found):.2f} x {base} [{found[0]:.2f} {found[-1]:.2f}]",
            flush=True,
        )


def _step(arguments: argparse.Namespace) -> None:
    """A QLoRA step over a LoRA step, on the rows and the model of ``training_step``."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import training_step

    with tempfile.TemporaryDirectory() as folder:
        model = training_step.write_model(Path(folder) / "model", "gpt2", layers=4)
        rows = training_step.token_rows(model, "real")
        for backend in ("torch", "jax"):
            steps = {
                method: training_step.our_step(model, rows, f"{backend}_{method}", "float32")
                for method in ("lora", "qlora")
            }
            spent = figures.in_turns(steps, arguments.step_rounds)
            found = sorted(qlora / lora for qlora, lora in zip(spent["qlora"], spent["lora"], strict=True))
            print(
                f"FIGURE nf4 step {backend}: QLoRA {statistics.median(found):.3f} x LoRA "
                f"[{found[0]:.3f} {found[-1]:.3f}], {json.dumps({k: statistics.median(v) for k, v in spent.items()})}",
                flush=True,
            )


if __name__ == "__main__":
    main()
