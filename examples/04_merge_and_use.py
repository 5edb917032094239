"""An adapter merged into its base, opened by transformers, and held to base and adapter.

    python examples/04_merge_and_use.py [folder]

About a minute on two cores. Expected: the merged folder gives the logits of PEFT's base and adapter within 1e-4, and
holds the tokenizer and its chat template.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mens_core import Planner, generate, merge, write_pairs

PROMPT = "Write the body of this function:\n\ndef is_absolute(path):"


def main(folder: Path, steps: int = 40) -> float:
    """Train, merge, open elsewhere; returns the largest difference of the logits."""
    corpus, run, merged = folder / "corpus", folder / "run", folder / "merged"
    write_pairs([Path(sysconfig.get_path("stdlib")) / "json"], corpus, max_chars=400, eval_fraction=0.1)
    plan = Planner().plan(
        data_dir=corpus,
        output_dir=run,
        backend="torch",
        max_steps=steps,
        epochs=20,
        batch_size=8,
        grad_accum=1,
        learning_rate=1e-3,
        seq_len=512,
    )
    Planner().run(plan.contract)
    report = merge([(run, 1.0)], output=merged, dtype="float32")
    print(f"merged {report['tensors']} tensors, fidelity {report.get('fidelity')}")

    tokenizer = AutoTokenizer.from_pretrained(merged)
    turns = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    base = AutoModelForCausalLM.from_pretrained(plan.model_dir, dtype=torch.float32)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        adapted = PeftModel.from_pretrained(base, run)(ids).logits
    apart = float((whole - adapted).abs().max())
    print(f"transformers on the merged folder against PEFT on base and adapter: {apart:.1e} apart")
    print(generate(PROMPT, model=str(merged), max_new_tokens=60))
    return apart


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/04"))
