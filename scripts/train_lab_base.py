"""Train the lab base: a GPT-2-shaped model of 3.5 million parameters that knows how Python code looks.

    python scripts/train_lab_base.py --output mens_core/lab_base

The package ships the result, so that a first fine-tune, the tests and the examples have a real base without
a download. The recipe below is the whole of it: shape, data, order and schedule follow from it and from the
interpreter.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from lab_base_card import card
from lab_base_data import Streams, build_streams
from torch.nn import functional
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from mens_core.text.lab import END_OF_TEXT_ID, TURN_END_ID, write_lab_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 20250
    width: int = 256
    layers: int = 4
    heads: int = 4
    #: 259 ids rounded up to a multiple of 8; the rest is never seen and never predicted.
    vocabulary: int = 264
    window_tokens: int = 1024
    #: One window at a time keeps the activations in the cache of one core.
    micro_rows: int = 4
    micro_batches: int = 2
    steps: int = 2700
    warmup_steps: int = 150
    peak_learning_rate: float = 2e-3
    final_learning_rate: float = 1e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    evaluate_every_steps: int = 150
    evaluate_windows: int = 64

    def learning_rate(self, step: int) -> float:
        """Linear warmup to the peak, then a cosine down to the final rate at the last step."""
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        span = self.peak_learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


class Windows:
    """Endless training windows: each pass cuts the stream at a new offset and shuffles the pieces."""

    def __init__(self, stream: torch.Tensor, recipe: Recipe) -> None:
        self._stream, self._length = stream, recipe.window_tokens + 1
        self._random = random.Random(recipe.seed)  # noqa: S311 (an order, not a secret)
        self._starts: list[int] = []

    def take(self, rows: int) -> torch.Tensor:
        """The next ``rows`` windows, int64 of shape (rows, window_tokens + 1)."""
        if len(self._starts) < rows:
            offset = self._random.randrange(self._length)
            starts = list(range(offset, len(self._stream) - self._length, self._length - 1))
            self._random.shuffle(starts)
            self._starts = starts
        chosen = [self._starts.pop() for _ in range(rows)]
        return torch.stack([self._stream[start : start + self._length] for start in chosen])


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """A freshly initialised model; its activation is the fused form of GPT-2's ``gelu_new``."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.window_tokens,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the predicted tokens of ``rows``, shape (rows, window_tokens + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, stream: torch.Tensor, recipe: Recipe, num_windows: int | None = None) -> float:
    """Mean loss in nats per token over the windows of ``stream``, or over about ``num_windows``."""
    length = recipe.window_tokens + 1
    starts = list(range(0, len(stream) - length, recipe.window_tokens))
    if num_windows is not None:
        starts = starts[:: max(1, len(starts) // num_windows)]
    losses = [loss_of(model, stream[start : start + length][None]).item() for start in starts]
    return sum(losses) / len(losses)


def build_optimizer(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=recipe.betas, fused=True)


def save(model: GPT2LMHeadModel, directory: Path, recipe: Recipe, text: str) -> None:
    """Write the model folder beside ``directory``, then put it there in one move."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    copy = build_model(recipe)
    copy.load_state_dict(model.state_dict())
    # The name every reader of GPT-2 configurations knows.
    copy.config.activation_function = "gelu_new"
    copy.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[END_OF_TEXT_ID, TURN_END_ID], pad_token_id=END_OF_TEXT_ID
    )
    copy.to(torch.bfloat16).save_pretrained(fresh)
    write_lab_tokenizer(fresh, max_length_tokens=recipe.window_tokens)
    (fresh / "README.md").write_text(text, encoding="utf-8")
    # Temporary folders are private; a package's data is not.
    fresh.chmod(0o755)
    for file in fresh.iterdir():
        file.chmod(0o644)
    retired = fresh.with_name(fresh.name + ".old")
    if directory.exists():
        directory.replace(retired)
    fresh.replace(directory)
    shutil.rmtree(retired, ignore_errors=True)


def train(recipe: Recipe, streams: Streams, output: Path, snapshots: Path | None) -> None:
    """Run the recipe, printing one line per evaluation, and leave the finished folder at ``output``."""
    stream, held_out = (torch.tensor(part, dtype=torch.long) for part in (streams.train, streams.held_out))
    model, windows, began = build_model(recipe), Windows(stream, recipe), time.monotonic()
    optimizer = build_optimizer(model, recipe)
    running, curve = float("nan"), list[tuple[int, float, float]]()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        total = 0.0
        for _ in range(recipe.micro_batches):
            loss = loss_of(model, windows.take(recipe.micro_rows)) / recipe.micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        running = total if math.isnan(running) else 0.98 * running + 0.02 * total
        done = step + 1
        if done in (25, 75) or done % recipe.evaluate_every_steps == 0 or done == recipe.steps:
            last = done == recipe.steps
            held = evaluate(model, held_out, recipe, None if last else recipe.evaluate_windows)
            curve.append((done, running, held))
            seconds = time.monotonic() - began
            losses = f"train {running:.4f}  held-out {held:.4f} nats/byte"
            print(f"step {done}/{recipe.steps}  {losses}  {seconds:.0f} s", flush=True)
            text = card(recipe, streams, curve, seconds, versions())
            if last:
                save(model, output, recipe, text)
            elif snapshots is not None:
                save(model, snapshots / f"step-{done:05d}", recipe, text)


def versions() -> str:
    """The versions that decide the arithmetic and the data."""
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"CPython {platform.python_version()}, {libraries}"


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--snapshots", type=Path, help="folder for a complete model at each evaluation (default: none)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe()
    train(recipe, build_streams(recipe.seed), arguments.output, arguments.snapshots)


if __name__ == "__main__":
    main()
