"""The same run on torch and on JAX, both curves in one picture.

    python examples/03_two_backends.py [folder]

Both start from the same adapter, see the same rows in the same order, and compute in float32. About two minutes on two
cores, of which half is JAX's compilation. Expected: the curves lie on each other, less than 1e-4 apart.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from matplotlib.figure import Figure

from mens_core import Planner, write_pairs


def main(folder: Path, steps: int = 40) -> float:
    """Train twice and draw; returns the largest distance of the curves."""
    corpus, picture = folder / "corpus", folder / "two_backends.png"
    write_pairs([Path(sysconfig.get_path("stdlib")) / "json"], corpus, max_chars=400, eval_fraction=0.1)
    curves = {}
    for backend in ("torch", "jax"):
        curves[backend] = (
            Planner()
            .run(
                data_dir=corpus,
                output_dir=folder / backend,
                backend=backend,
                method="lora",
                max_steps=steps,
                epochs=20,
                batch_size=4,
                grad_accum=2,
                learning_rate=1e-3,
                seq_len=512,
            )
            .losses
        )
    apart = max(abs(one - other) for one, other in zip(*curves.values(), strict=True))

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (backend, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, steps + 1), losses, style, label=backend, linewidth=2)
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", title=f"at most {apart:.1e} apart")
    axes.legend()
    figure.savefig(picture, dpi=150)
    print(f"{steps} steps on two backends, at most {apart:.1e} apart: {picture}")
    return apart


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/03"))
