"""Whether time a token and memory stay what they are as rows and accumulation grow; drawn as one picture.

    python benchmarks/growth.py [--most-rows 1000000] [--picture benchmarks/growth.png]

A tiny Qwen2-shaped model on torch. Rows: reading, checking, tokenising and masking of short rows, then the batches of
one epoch; CPU microseconds a token and the most private memory above the imports, each size in a fresh process. Then a
whole run of three steps over as many rows, and all private memory of its process. The tokens and what is known of each
row lie in mapped files, whose pages the system takes back as it needs them.
Accumulation: steps over windows of 1 to 64 batches of one row of 32 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import figures

ACCUMULATION = (1, 4, 16, 64)


def main() -> None:
    """Measure, state and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rows or asked.run:
        print(json.dumps(of_rows(asked.rows) if asked.rows else of_run(asked.run)))
        return
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= asked.most_rows]
    rows = {count: json.loads(figures.in_child(__file__, "--rows", str(count))) for count in counts}
    for count in counts:
        rows[count]["run_mib"] = json.loads(figures.in_child(__file__, "--run", str(count)))
    for count, found in rows.items():
        print(
            f"  {count:,} rows: {found['microseconds']:.2f} µs a token, {found['mib']:.0f} MiB above the imports; "
            f"a run {found['run_mib']:.0f} MiB"
        )
    last, first = rows[counts[-1]], rows[counts[1]]
    what = f"rows, {counts[1]:,} to {counts[-1]:,}"
    figures.state(
        "growth", f"time a token, {what}", [last["microseconds"]], [first["microseconds"]], "as much", "<= 1.1"
    )
    figures.state("growth", f"a run's memory, {what}", [last["run_mib"]], [first["run_mib"]], "as much", "<= 1.1")
    figures.state("growth", f"memory above the imports, {what}", [last["mib"]], [first["mib"]], "as much", "<= 1.1")
    windows = of_windows(asked.rounds)
    for size, seconds in windows.items():
        print(f"  windows of {size}: {1e6 * statistics.median(seconds) / size / 32:.1f} µs a token")
    share = [value / ACCUMULATION[-1] for value in windows[ACCUMULATION[-1]]]
    what = "time a token, 64 batches a window for 1"
    figures.state("growth", what, share, windows[1], "as much", "<= 1.1")
    if asked.picture:
        draw(rows, windows, asked.picture)


def of_rows(count: int) -> dict[str, float]:
    """Reading and batching of so many short rows."""
    figures.one_core()
    import data_pipeline  # it chooses its core and caches while it is imported

    from mens_core.text.pack import Batching

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        folder = Path(scratch)
        data_pipeline.write_tokenizer(folder)
        data_pipeline.write_rows(folder / "train.jsonl", count, lines=1)
        encoder = data_pipeline.encoder_of(folder / "train.jsonl", template=False)
        tokens = 0

        def epoch() -> None:
            nonlocal tokens
            rows = data_pipeline.read(folder / "train.jsonl", encoder, "rows").rows
            for window in Batching(batch_size=8, grad_accum=1, seed=0).windows(rows, 0):
                tokens += sum(len(batch.input_ids) for batch in window)

        begun = time.process_time()
        mib = figures.private_peak(epoch)
        return {"microseconds": 1e6 * (time.process_time() - begun) / tokens, "mib": mib}


def of_run(count: int) -> float:
    """MiB of private memory of a process that trains three steps on so many short rows."""
    figures.one_core()
    import data_pipeline  # it chooses its core and caches while it is imported
    import overhead

    from mens_core import Planner

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        folder = Path(scratch)
        model = overhead.write(folder / "model")
        (folder / "rows").mkdir()
        data_pipeline.write_rows(folder / "rows" / "train.jsonl", count, lines=1)
        before = figures.resident("RssAnon")
        fields = {"model": str(model), "tokenizer": "lab", "backend": "torch", "max_steps": 3, "batch_size": 8}
        run = functools.partial(
            Planner().run, data_dir=folder / "rows", output_dir=folder / "run", on_overlong="drop", **fields
        )
        return before + figures.private_peak(run)


def of_windows(rounds: int) -> dict[int, list[float]]:
    """CPU seconds of a step over windows of so many batches."""
    import overhead  # it chooses its core while it is imported, before NumPy may come
    import training_step

    from mens_core.text.pack import pack
    from mens_core.text.tokens import TokenRows

    with tempfile.TemporaryDirectory() as folder:
        model = overhead.write(Path(folder) / "model")
        row = overhead.random_row()
        batch = pack(TokenRows.of([row]))
        session, backend = training_step.open_session(model, [row], "torch_lora", "float32")
        variants = {
            str(size): lambda size=size: backend.step(session, [batch] * size, training_step.RATE)
            for size in ACCUMULATION
        }
        return {int(name): seconds for name, seconds in figures.in_turns(variants, rounds).items()}


def draw(rows: dict[int, dict[str, float]], windows: dict[int, list[float]], picture: Path) -> None:
    """Three small curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time_axis, memory_axis, window_axis) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    time_axis.plot(list(rows), [found["microseconds"] for found in rows.values()], "o-")
    time_axis.set(title="Data: CPU µs a token", xlabel="rows", xscale="log")
    memory_axis.plot(list(rows), [found["run_mib"] for found in rows.values()], "o-", label="a run, all of it")
    memory_axis.plot(list(rows), [found["mib"] for found in rows.values()], "o-", label="data, above the imports")
    memory_axis.set(title="MiB of private memory", xlabel="rows", xscale="log")
    memory_axis.legend(fontsize="small", loc="center right")
    per_token = [1e6 * statistics.median(seconds) / size / 32 for size, seconds in windows.items()]
    window_axis.plot(list(windows), per_token, "o-")
    window_axis.set(title="Training: CPU µs a token", xlabel="batches a window", xscale="log")
    for axis in (time_axis, memory_axis, window_axis):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
