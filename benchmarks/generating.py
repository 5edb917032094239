"""Greedy generation with a key/value cache, batch 1: ours against transformers' own ``generate``.

    python benchmarks/generating.py [--rounds 5] [--tokens 64]

GPT-2 small, random weights, float32, a prompt of 64 tokens, on one core; the tokens must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import figures

figures.one_core()

import numpy as np
import torch
import training_step
from transformers import AutoModelForCausalLM

from mens_core.contract import FineTuneContract
from mens_core.exchange import BatchShape, GenerateSettings
from mens_core.planner import resolve

PROMPT = 64


def main() -> None:
    """One line a backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = training_step.write_model(Path(folder) / "model", "gpt2", asked.layers)
        prompt = np.random.Generator(np.random.Philox(key=0)).integers(0, 50_257, PROMPT).tolist()
        variants = {"transformers": theirs(model, prompt, asked.tokens)}
        variants |= {backend: ours(model, backend, prompt, asked.tokens) for backend in ("torch", "jax")}
        found = {name: run() for name, run in variants.items()}
        if any(tokens != found["transformers"] for tokens in found.values()):
            raise SystemExit("the tokens are not transformers', so there is nothing to compare")
        spent = figures.in_turns(variants, asked.rounds)
    for name, seconds in spent.items():
        print(f"  {name}: {asked.tokens / statistics.median(seconds):.1f} tokens per CPU second")
    for backend in ("torch", "jax"):
        what = f"greedy generation, GPT-2 small, {backend}"
        figures.state(14, what, spent["transformers"], spent[backend], "transformers' speed", ">= 1.0")


def theirs(model: Path, prompt: list[int], tokens: int):
    """As transformers' documentation generates."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([prompt])

    def run() -> list[int]:
        found = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None
        )
        return found[0, len(prompt) :].tolist()

    return run


def ours(model: Path, backend_name: str, prompt: list[int], tokens: int):
    """The hook that generates, without an adapter's update: B is zero."""
    contract = FineTuneContract.from_fields(
        trains=False, model=str(model), tokenizer="lab", backend=f"{backend_name}_lora", dtype="float32", rank=1
    )
    plan, backend = resolve(contract, trains=False)
    shape = BatchShape(rows=1, tokens=PROMPT, longest_row=PROMPT, supervised=1, batches=1)
    session = backend.open(plan, shape)
    settings = GenerateSettings(max_new_tokens=tokens, stop_tokens=())
    return lambda: backend.generate(session, prompt, settings)


if __name__ == "__main__":
    main()
