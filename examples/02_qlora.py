"""QLoRA: the base in four bits, and what that costs.

    python examples/02_qlora.py [folder]

Plans the same run with LoRA and with QLoRA, trains with QLoRA, and compares the held-out loss of the quantised base, of
the adapter beside it, and of the adapter merged into the base as it was. About two minutes on two cores. Expected: the
weights of the base take an eighth, and the loss falls as it does with LoRA.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from mens_core import Planner, evaluate_model, merge, write_pairs


def main(folder: Path, steps: int = 60) -> dict[str, float]:
    """Plan, train, merge, measure; returns the losses."""
    corpus, run, merged = folder / "corpus", folder / "run", folder / "merged"
    library = Path(sysconfig.get_path("stdlib"))
    write_pairs([library / "json", library / "email"], corpus, max_chars=400, eval_fraction=0.1)
    fields = {"data_dir": corpus, "batch_size": 8, "grad_accum": 1, "learning_rate": 1e-3, "seq_len": 512}
    for method in ("lora", "qlora"):
        plan = Planner().plan(output_dir=run, backend="torch", method=method, max_steps=steps, **fields)
        bits = 4.127 if method == "qlora" else 32
        peak = plan.estimate()["peak_memory_bytes"]
        print(f"{method:6} {bits:6.3f} bits a weight of the linear layers, {peak / 2**20:.0f} MiB in all by the plan")

    result = Planner().run(output_dir=run, backend="torch", method="qlora", max_steps=steps, **fields)
    report = merge([(run, 1.0)], output=merged)
    losses = {
        "quantised base": result.eval_loss_before,
        "quantised base and adapter": result.eval_loss_after,
        "merged into the original base": evaluate_model(corpus / "eval.jsonl", model=str(merged))["loss"],
    }
    for name, loss in losses.items():
        print(f"{name:30} held-out loss {loss:.4f}")
    print(f"merged in {report['seconds']:.1f} s: {merged}")
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/02"))
