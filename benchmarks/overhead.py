"""What a step costs where arithmetic is next to nothing: ours against a plain PEFT loop and Hugging Face's Trainer.

    python benchmarks/overhead.py [--rounds 5]

A Qwen2-shaped model of 4 layers and width 64, one row of 32 tokens, vocabulary 260; fifty steps a round, one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import figures

figures.one_core()

import numpy as np
import torch
import training_step
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

from mens_core.text.tokens import TokenRow

STEPS, TOKENS = 50, 32
GOALS = {
    "torch_lora": {"PEFT loop": "<= 0.6", "Trainer": "<= 0.33"},
    "jax_lora": {"PEFT loop": "<= 0.2", "Trainer": "<= 0.1"},
}


def main() -> None:
    """One line a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "model")
        row = random_row()
        variants = {
            "PEFT loop": often(training_step.peft_step(model, [row], "peft", "float32", checkpointed=False)),
            "Trainer": trainer(model, row, Path(folder) / "trainer"),
            "torch_lora": often(training_step.our_step(model, [row], "torch_lora", "float32")),
            "jax_lora": often(training_step.our_step(model, [row], "jax_lora", "float32")),
        }
        spent = figures.in_turns(variants, asked.rounds)
    for name, seconds in spent.items():
        print(f"  {name}: {1e3 * statistics.median(seconds) / STEPS:.2f} ms a step")
    for own, goals in GOALS.items():
        for peer, goal in goals.items():
            what = f"{training_step.OURS[own]} step of a tiny model"
            figures.state(10, what, spent[own], spent[peer], f"the {peer}'s time", goal)


def write(folder: Path) -> Path:
    """A random model."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=260,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def random_row() -> TokenRow:
    """All supervised."""
    ids = np.random.Generator(np.random.Philox(key=0)).integers(0, 260, TOKENS, dtype=np.int32)
    return TokenRow(ids, np.ones(TOKENS, bool))


def often(step: training_step.Step) -> Callable[[], None]:
    """Fifty steps, each of which is waited for."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def trainer(model: Path, row: TokenRow, output: Path) -> Callable[[], None]:
    """Fifty steps of Trainer, made anew each time as a run makes it; it saves and reports nothing."""
    base = AutoModelForCausalLM.from_pretrained(model)
    wrapped = get_peft_model(base, LoraConfig(r=training_step.RANK, target_modules="all-linear"))
    ids = torch.from_numpy(row.input_ids).long()
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * STEPS
    settings = TrainingArguments(
        str(output),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        use_cpu=True,
    )

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(wrapped, settings, train_dataset=rows).train()

    return run


if __name__ == "__main__":
    main()
