"""All benchmarks against peers, one after the other, in half an hour: figures into a file, bars into a picture.

    make bench         or         python benchmarks/suite.py [--rounds 5] [--only training_step,head] [--into FOLDER]

Writes ``benchmarks/results.json`` (machine, versions, every figure with its goal), the same as a table for people,
``results.md``, and as bars, ``results.png``. A figure that misses its goal is written down like any other; only a
benchmark that fails ends the suite. On a processor that does not multiply bfloat16, where a step of PEFT's takes
minutes, float32 stands in for it; such processors are slower, too, and it takes longer than half an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import figures

HERE = Path(__file__).parent
PACKAGES = ("torch", "jax", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numba", "numpy")
STEPS = [
    # (shape, number format, rows, allocator, variants)
    ("gpt2", "float32", "real", "default", "peft,grouped,torch_lora,jax_lora"),
    ("gpt2", "float32", "real", "pages kept", "peft,grouped,torch_lora"),
    ("gpt2", "bfloat16", "real", "default", "peft,grouped,peft_qlora,torch_lora,torch_qlora"),
    ("gpt2", "bfloat16", "real", "pages kept", "peft,grouped,torch_lora"),
    ("qwen", "float32", "real", "default", "peft,torch_lora"),
    ("qwen", "bfloat16", "real", "default", "peft,peft_qlora,torch_lora,torch_qlora"),
    ("qwen", "bfloat16", "real", "pages kept", "peft,torch_lora"),
    ("gpt2", "bfloat16", "dense", "default", "peft,torch_lora"),
    ("gpt2", "bfloat16", "dense", "pages kept", "peft,torch_lora"),
]
MEMORY = [
    # (shape, number format, rows, ours, theirs, goal)
    ("gpt2", "float32", "real", "torch_lora", "peft", "<= 0.15"),
    ("gpt2", "bfloat16", "real", "torch_lora", "peft", "<= 0.15"),
    ("qwen", "bfloat16", "real", "torch_lora", "peft", "<= 0.15"),
    ("gpt2", "bfloat16", "dense", "torch_lora+checkpointed", "peft+checkpointed", "<= 0.35"),
]
OTHERS = ("head", "compiling", "overhead", "loading", "startup", "generating")


def main() -> None:
    """Run, gather, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(("training_step", "memory", *OTHERS)), help="comma between")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the three files (default: benchmarks)")
    asked = parser.parse_args()
    # Before half an hour is spent, not after it.
    asked.into.mkdir(parents=True, exist_ok=True)
    chosen = asked.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        collected = Path(folder) / "figures"
        collected.touch()
        os.environ[figures.COLLECTED] = str(collected)
        parts = {"training_step": lambda: steps(asked.rounds), "memory": memory}
        parts |= {name: functools.partial(other, name, asked.rounds) for name in OTHERS}
        seconds = {name: lasted(part) for name, part in parts.items() if name in chosen}
        found = [json.loads(line) for line in collected.read_text(encoding="utf-8").splitlines()]
    results = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(seconds.values()),
        "seconds_of": seconds,
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "figures": found,
    }
    (asked.into / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (asked.into / "results.md").write_text(page(results), encoding="utf-8")
    draw(found, asked.into / "results.png")
    judged = [figure["reached"] for figure in found if figure["reached"] is not None]
    print(f"{sum(judged)} of {len(judged)} goals reached, {results['seconds']} s")


def lasted(part: Callable[[], None]) -> int:
    """Seconds."""
    begun = time.perf_counter()
    part()
    return round(time.perf_counter() - begun)


def other(name: str, rounds: int) -> None:
    """One of ``OTHERS``."""
    figures.in_child(str(HERE / f"{name}.py"), "--rounds", str(rounds))


def steps(rounds: int) -> None:
    """Training steps, each case in a process of its own with its allocator."""
    cases: dict[tuple[str, ...], dict[str, None]] = {}
    for shape, dtype, rows, allocator, variants in STEPS:
        # Where one format stands in for the other, a case comes once, with the variants of both.
        case = cases.setdefault((shape, figures.format_here(dtype), rows, allocator), {})
        case.update(dict.fromkeys(variants.split(",")))
    for (shape, dtype, rows, allocator), variants in cases.items():
        words = ["--shape", shape, "--dtype", dtype, "--rows", rows, "--allocator", allocator]
        words += ["--variants", ",".join(variants)]
        script, settings = str(HERE / "training_step.py"), figures.ALLOCATORS[allocator]
        figures.in_child(script, *words, "--rounds", str(rounds), environment=settings)


def memory() -> None:
    """Peaks above the model, each variant in a process of its own; they hardly differ from run to run, so one each."""
    cases = [(shape, figures.format_here(dtype), *rest) for shape, dtype, *rest in MEMORY]
    for shape, dtype, rows, ours, theirs, goal in dict.fromkeys(cases):
        words = ["--shape", shape, "--dtype", dtype, "--rows", rows, "--memory"]
        own, other = (float(figures.in_child(str(HERE / "training_step.py"), *words, name)) for name in (ours, theirs))
        what = f"peak above the model, {shape}, {dtype}, {rows} rows, {ours}"
        figures.state(3, what, [own], [other], f"{theirs}'s", goal)


def machine() -> dict[str, object]:
    """What the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    return {
        "processor": known.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": wide,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def page(results: dict[str, Any]) -> str:
    """The figures as people read them, in Markdown."""
    machine, found = results["machine"], results["figures"]
    judged = [figure["reached"] for figure in found if figure["reached"] is not None]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""# What `make bench` measured

{results["taken"]}, in {results["seconds"]} s, on one of {machine["cores"]} cores of {machine["processor"]}
({", ".join(machine["instructions"])}); {machine["system"]}, Python {machine["python"]}; {versions}.

Every ratio is taken round by round of two things beside each other in one run: median [least, most].
{sum(judged)} of {len(judged)} goals are reached. Of the linear work of the Qwen shape the head is 77 %, of that of a
model of 7 B it is 7 %: what is gained there overstates what is gained on large models.

| row | what | allocator | ratio | of | goal | |
|---|---|---|---|---|---|---|
{chr(10).join(line(figure) for figure in sorted(found, key=place))}
"""


def place(figure: dict[str, Any]) -> tuple[bool, int]:
    """By the rows of the goals; what has none comes last."""
    row = figure["row"]
    return (False, row) if isinstance(row, int) else (True, 0)


def line(figure: dict[str, Any]) -> str:
    """Of the table."""
    verdict = {True: "reached", False: "**not reached**", None: ""}[figure["reached"]]
    ratio = f"{figure['ratio']:.2f} [{figure['least']:.2f}, {figure['most']:.2f}]"
    cells = [figure["row"], figure["what"], figure["allocator"], ratio, figure["against"], figure["goal"], verdict]
    return f"| {' | '.join(map(str, cells))} |"


def draw(found: list[dict[str, object]], picture: Path) -> None:
    """A bar for each training step against a peer: how many times as fast, with the least and the most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    like = {"peft": "LoRA", "grouped": "LoRA", "peft_qlora": "QLoRA"}
    bars = [figure for figure in found if f" {like.get(str(figure['against']))} " in str(figure["what"])][::-1]
    if not bars:
        return
    kept = {"default": "", "pages kept": ", pages kept"}
    names = [f"{bar['what']}{kept[str(bar['allocator'])]}\nagainst {bar['against']}" for bar in bars]
    ratios = [bar["ratio"] for bar in bars]
    reach = [[bar["ratio"] - bar["least"] for bar in bars], [bar["most"] - bar["ratio"] for bar in bars]]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(bars) + 1), layout="constrained")
    axis.margins(y=0.01)
    axis.barh(names, ratios, xerr=reach, color="#3b6ea5", ecolor="#888888")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("times as fast")
    axis.tick_params(axis="y", labelsize=7)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
