"""What a plan says of memory and time against what the run then took: four kernels, thirteen runs each.

    make bench-plans    or    python benchmarks/plan_accuracy.py [--kernels torch_lora,jax_lora] [--dtype bfloat16]

Every run is a process of its own that goes through the front door, ``Planner().run``, on a random model and rows of
known length, 30 % supervised, on one core. Before it starts, the plan is made from speeds that were measured once a
kernel on other, smaller models. Measured are the process's highest resident size and the median step of those behind
the second; the core is shared, so a step counts with the processor time it took, and the wall time of telemetry.jsonl
stands beside it. ``rest`` is the error with the framework's part taken off both sides.
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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

KERNELS = ("torch_lora", "torch_qlora", "jax_lora", "jax_qlora")
STEPS, WARM = 7, 2
SUPERVISED = 0.3
# Tokens of a row that are neither prompt nor answer: four tags, "user\n", "\n" and "assistant\n".
_FRAME = 4 + 5 + 1 + 10
_MARK = "MEASURED "


@attrs.frozen(kw_only=True)
class Run:
    """A model and its rows; ``size`` is width, layers, heads, key/value heads, head width, feed-forward width."""

    name: str
    arch: str
    size: tuple[int, int, int, int, int, int]
    vocab_size: int
    lengths: tuple[int, ...]
    batch_size: int
    grad_accum: int = 1
    targets: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()


RUNS = (
    Run(
        name="gpt2 256x6, 2x64",
        arch="gpt2",
        size=(256, 6, 4, 4, 64, 1024),
        vocab_size=8192,
        lengths=(64,),
        batch_size=2,
    ),
    Run(
        name="gpt2 768x12, 4x128",
        arch="gpt2",
        size=(768, 12, 12, 12, 64, 3072),
        vocab_size=50257,
        lengths=(128,),
        batch_size=4,
    ),
    Run(
        name="llama 512x8, 2x256",
        arch="llama",
        size=(512, 8, 8, 8, 64, 1376),
        vocab_size=32000,
        lengths=(256,),
        batch_size=2,
    ),
    Run(
        name="llama 384x12, 4x512",
        arch="llama",
        size=(384, 12, 6, 2, 64, 1024),
        vocab_size=16000,
        lengths=(512,),
        batch_size=4,
    ),
    Run(
        name="qwen2 640x10, 1x1024",
        arch="qwen2",
        size=(640, 10, 10, 2, 64, 1728),
        vocab_size=32000,
        lengths=(1024,),
        batch_size=1,
    ),
    Run(
        name="qwen3 512x8, 8x128",
        arch="qwen3",
        size=(512, 8, 8, 4, 64, 1536),
        vocab_size=50000,
        lengths=(128,),
        batch_size=8,
    ),
    Run(
        name="qwen3 256x6, 4 x 2x(100 160 256)",
        arch="qwen3",
        size=(256, 6, 8, 4, 32, 688),
        vocab_size=8192,
        lengths=(100, 160, 256),
        batch_size=2,
        grad_accum=4,
    ),
    Run(
        name="llama 768x4, 2x512, q and v",
        arch="llama",
        size=(768, 4, 12, 4, 64, 2048),
        vocab_size=8192,
        lengths=(512,),
        batch_size=2,
        targets=("q_proj", "v_proj"),
    ),
    Run(
        name="gpt2 768x12, 1x96",
        arch="gpt2",
        size=(768, 12, 12, 12, 64, 3072),
        vocab_size=50257,
        lengths=(96,),
        batch_size=1,
    ),
    Run(
        name="llama 640x6, 3x300",
        arch="llama",
        size=(640, 6, 10, 5, 64, 1720),
        vocab_size=24000,
        lengths=(300,),
        batch_size=3,
    ),
    Run(
        name="gpt2 512x8, 2 x 4x(90 180 270)",
        arch="gpt2",
        size=(512, 8, 8, 8, 64, 2048),
        vocab_size=30000,
        lengths=(90, 180, 270),
        batch_size=4,
        grad_accum=2,
    ),
    Run(
        name="qwen2 384x8, 2x700",
        arch="qwen2",
        size=(384, 8, 6, 2, 64, 1024),
        vocab_size=20000,
        lengths=(700,),
        batch_size=2,
    ),
    Run(
        name="llama 512x6, 2x400, head, table and norms",
        arch="llama",
        size=(512, 6, 8, 4, 64, 1376),
        vocab_size=50000,
        lengths=(400,),
        batch_size=2,
        modules_to_save=("lm_head", "embed_tokens", "norm", "input_layernorm"),
    ),
)


def main() -> None:
    """Run the grid, or with ``--one`` a single step of it; each is a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _ONE[arguments.one[0]](json.loads(arguments.one[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        _grid(arguments.kernels.split(","), arguments.dtype, Path(folder))


def _grid(kernels: Sequence[str], dtype: str, folder: Path) -> None:
    """Measure each kernel's speed, then plan and run the grid; print a row a run and the figures."""
    print("packages: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "jax")))
    for number, run in enumerate(RUNS):
        _process("write", {"run": attrs.asdict(run), "folder": str(folder / str(number))}, folder)
    errors: dict[str, list[dict[str, float]]] = {}
    for kernel in kernels:
        speed = _process("speed", {"kernel": kernel, "dtype": dtype}, folder)
        print(f"{kernel}: measured in {speed['took']:.0f} s: {speed['seconds']}", flush=True)
        for number, run in enumerate(RUNS):
            fields = {"fields": {**_fields(kernel, run, folder / str(number)), "dtype": dtype}}
            found = _process("plan", fields, folder) | _process("run", fields, folder)
            errors.setdefault(kernel, []).append(_row(kernel, run, found))
    for kernel, rows in errors.items():
        for what in rows[0]:
            of_kernel = sorted((abs(row[what]), row[what]) for row in rows)
            middle = statistics.median(size for size, _ in of_kernel)
            print(f"FIGURE plan_accuracy {kernel} {what}: median {middle:.1%}, worst {of_kernel[-1][1]:+.1%}")


def _row(kernel: str, run: Run, found: Mapping[str, Any]) -> dict[str, float]:
    """Print one line of the table; the errors, signed, as shares of what was measured."""
    planned, measured, framework = sum(found["memory"].values()), found["peak"], found["memory"]["framework"]
    errors = {
        "memory": planned / measured - 1,
        "rest": (planned - framework) / (measured - framework) - 1,
        "seconds": found["seconds"] / found["cpu"] - 1,
        "seconds by the table": found["table"] / found["cpu"] - 1,
    }
    print(
        f"| {kernel} | {run.name} | {planned / 2**20:.0f} | {measured / 2**20:.0f} | {errors['memory']:+.0%} "
        f"| {errors['rest']:+.0%} | {found['seconds']:.3f} | {found['cpu']:.3f} | {found['wall']:.3f} "
        f"| {errors['seconds']:+.0%} | {errors['seconds by the table']:+.0%} |",
        flush=True,
    )
    return errors


def _fields(kernel: str, run: Run, folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "tokenizer": "lab",
        "data_dir": str(folder),
        "output_dir": str(folder / kernel),
        "backend": kernel,
        "device": "cpu",
        "targets": run.targets,
        "modules_to_save": run.modules_to_save,
        "batch_size": run.batch_size,
        "grad_accum": run.grad_accum,
        "max_steps": STEPS,
    }


def _process(what: str, argument: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run this script for one thing, on one core, with a cache of its own; what it printed last."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, __file__, "--one", what, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{what} {argument} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    return found


def _one_core() -> None:
    # XLA takes one thread for each core it may use, whatever its flags say.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _write(argument: Mapping[str, Any]) -> None:
    from mens_core.random_model import Size, write_random_weights

    run, folder = argument["run"], Path(argument["folder"])
    names = ("width", "layers", "heads", "kv_heads", "head_dim", "inner")
    size = Size(**dict(zip(names, run["size"], strict=True)), positions=1024)
    (folder / "model").mkdir(parents=True)
    write_random_weights(folder / "model", arch=run["arch"], size=size, vocab_size=run["vocab_size"])
    rows = []
    for number in range(STEPS * run["batch_size"] * run["grad_accum"]):
        length = run["lengths"][number % len(run["lengths"])]
        # The answer's end tag is supervised as well.
        answer = round(SUPERVISED * length) - 1
        rows.append({"prompt": "a" * (length - _FRAME - answer), "response": "b" * answer})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(_MARK + "{}")


def _speed(argument: Mapping[str, Any]) -> None:
    from mens_core.measuring import measure_speed

    _one_core()
    begun = time.perf_counter()
    speed = measure_speed(argument["kernel"], device="cpu", dtype=argument["dtype"])
    taken = {"took": time.perf_counter() - begun, "seconds": dict(speed.seconds)}
    print(_MARK + json.dumps(taken))


def _plan(argument: Mapping[str, Any]) -> None:
    """What the plan says, with the speed measured here and with the table's."""
    from mens_core import Planner

    _one_core()
    found = Planner().plan(**argument["fields"]).offer
    os.environ["XDG_CACHE_HOME"] = "/nonexistent"
    table = Planner().plan(**argument["fields"]).offer
    planned = {"memory": dict(found.memory), "seconds": found.seconds_per_step, "table": table.seconds_per_step}
    print(_MARK + json.dumps(planned))


def _run(argument: Mapping[str, Any]) -> None:
    from mens_core import Planner
    from mens_core.training.memory import peak_memory_bytes

    _one_core()
    spent: list[float] = []

    def observe(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            spent.append(time.process_time())

    result = Planner().run(observers=[observe], **argument["fields"])
    lines = (result.output_dir / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    walls = [event["payload"]["step_seconds"] for event in map(json.loads, lines) if event["event"] == "step"]
    # A step is recorded when the next one has been handed over, the last one at once: its difference is no step's.
    processor = [after - before for before, after in pairwise(spent)][:-1]
    found = {
        "peak": peak_memory_bytes(),
        "cpu": statistics.median(processor[WARM - 1 :]),
        "wall": statistics.median(walls[WARM:]),
    }
    print(_MARK + json.dumps(found))


_ONE = {"write": _write, "speed": _speed, "plan": _plan, "run": _run}

if __name__ == "__main__":
    main()
