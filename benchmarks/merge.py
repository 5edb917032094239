"""What a merge costs, against PEFT's load, merge and save of the same adapter, and against a copy of the file.

    ours    python -m mens_core merge-adapter
    peft    AutoModelForCausalLM + PeftModel, merge_and_unload, save_pretrained
    copy    shutil.copyfile of the weights

Each in a process of its own, on one core or so many, in turns; wall-clock seconds of the work without the imports,
and the peak of resident memory above what the imports took. The merged tensors are compared bit by bit first.

    make bench-merge      or     python benchmarks/merge.py [--rounds 5] [--cores 1]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures
import numpy as np

ROUNDS = 5
# 0.52 billion parameters, 1.04 GB in bfloat16: the widths of a 1.7 B model with fewer layers.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 6144,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def main() -> None:
    """Measure and print one line a claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        measure(arguments.work, arguments.folder, arguments.cores)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
        for number in range(arguments.rounds):
            for name in WORK:
                shutil.rmtree(folder / name, ignore_errors=True)
                # What one left in memory for the disk to take is not the next one's to wait for.
                os.sync()
                found[name].append(child(name, folder, arguments.cores))
            if number == 0:
                compare(folder)
        say(found)


def write(folder: Path) -> None:
    """A random base in bfloat16 and a random adapter in PEFT's format."""
    import ml_dtypes

    from mens_core.artifacts.tensors import stream_tensors, write_tensors
    from mens_core.hf.keymap import linear_shapes, tensor_shapes
    from mens_core.hf.layout import read_layout

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    layout, draw = read_layout(base), np.random.default_rng(0)
    shapes = tensor_shapes(layout)
    specs = {name: ("BF16", shape) for name, shape in shapes.items()}

    def drawn(name: str) -> list[np.ndarray]:
        return [(0.02 * draw.standard_normal(shapes[name], np.float32)).astype(ml_dtypes.bfloat16)]

    stream_tensors(base / "model.safetensors", specs, drawn, {"format": "pt"})
    linears = linear_shapes(layout)
    pairs = {}
    for module, (out, into) in linears.items():
        for half, shape in (("A", (16, into)), ("B", (out, 16))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            pairs[name] = 0.02 * draw.standard_normal(shape, np.float32)
    write_tensors(adapter / "adapter_model.safetensors", pairs, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32}
    config |= {"base_model_name_or_path": str(base), "target_modules": sorted(linears)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def child(name: str, folder: Path, cores: int) -> dict[str, float]:
    """One kind of work in a fresh process."""
    words = [sys.executable, __file__, "--work", name, "--folder", str(folder), "--cores", str(cores)]
    # Modules that are imported on use come from their compiled files, as on a user's machine.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "OMP_NUM_THREADS": str(cores)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(name: str, folder: Path, cores: int) -> None:
    """Seconds, and MiB above the imports."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    work = WORK[name](folder)
    # What the imports took for a moment is not the work's.
    before = figures.forget_peak()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": figures.resident("VmHWM") - before}))


def ours(folder: Path):
    """Imports first."""
    import mens_core
    from mens_core.plugins import load_backend

    load_backend("torch")
    merge = mens_core.merge
    return lambda: merge([(folder / "adapter", 1.0)], base=folder / "base", output=folder / "ours", backend="torch")


def peft(folder: Path):
    """As PEFT's documentation merges."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "peft")

    return run


def copy(folder: Path):
    """The floor of whoever writes as much."""
    (folder / "copy").mkdir()
    return lambda: shutil.copyfile(folder / "base" / "model.safetensors", folder / "copy" / "model.safetensors")


WORK = {"ours": ours, "peft": peft, "copy": copy}


def compare(folder: Path) -> None:
    """Every tensor, bit by bit."""
    from mens_core.artifacts.tensors import open_tensors

    expected, found = open_tensors(folder / "peft"), open_tensors(folder / "ours")
    different = [name for name in expected if (expected[name].view(np.uint16) != found[name].view(np.uint16)).any()]
    size = (folder / "base" / "model.safetensors").stat().st_size / 1e9
    print(f"{len(expected)} tensors, {size:.2f} GB: {len(different)} differ from PEFT's in any bit")


def say(found: dict[str, list[dict[str, float]]]) -> None:
    """Medians and ratios by round."""
    for name, rounds in found.items():
        seconds, mib = ([entry[key] for entry in rounds] for key in ("seconds", "mib"))
        print(f"{name:5} {statistics.median(seconds):6.2f} s  peak {statistics.median(mib):6.0f} MiB above the imports")
    for other in ("peft", "copy"):
        ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in zip(found[other], found["ours"], strict=True)]
        memory = [mine["mib"] / max(theirs["mib"], 1) for theirs, mine in zip(found[other], found["ours"], strict=True)]
        print(
            f"against {other}: {statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] as fast, "
            f"{statistics.median(memory):.2f}x the memory"
        )


if __name__ == "__main__":
    main()
