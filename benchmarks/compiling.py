"""How long JAX compiles a step of 32 layers, against one of 8; how often it compiles is a test's, and at most thrice.

    python benchmarks/compiling.py [--rounds 5]

A Llama-shaped model of width 128; each compilation in a fresh process without a cache, CPU seconds of the first step
less those of the second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import figures


def main() -> None:
    """Each model in processes of its own, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.model:
        print(measure(asked.model))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {layers: write(Path(folder) / str(layers), layers) for layers in (8, 32)}
        found: dict[int, list[float]] = {layers: [] for layers in models}
        for _ in range(asked.rounds):
            for layers, model in models.items():
                found[layers].append(float(figures.in_child(__file__, "--model", str(model))))
    figures.state(9, "compiling 32 layers, JAX", found[32], found[8], "8 layers' time", "<= 1.3")


def write(folder: Path, layers: int) -> Path:
    """A random model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        vocab_size=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure(model: Path) -> float:
    """CPU seconds that the first step takes beyond the second."""
    import training_step

    step = training_step.our_step(model, training_step.token_rows(model, "real"), "jax_lora", "float32")
    marks = [time.process_time()]
    for _ in range(2):
        step()
        marks.append(time.process_time())
    return (marks[1] - marks[0]) - (marks[2] - marks[1])


if __name__ == "__main__":
    main()
