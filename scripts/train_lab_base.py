"""Train the lab base: a GPT-2-shaped model of 3.5 million parameters that knows how Python code looks.

    python scripts/train_lab_base.py --output mens_core/lab_base

The package ships the result, so that a first fine-tune, the tests and the examples have a real base without
a download. ``lab_base_recipe.Recipe`` is the whole of it: shape, data, order and schedule follow from it and from the
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
from pathlib import Path

import torch
import transformers
from lab_base_card import card
from lab_base_data import Streams, build_streams
from lab_base_recipe import Recipe
from torch.nn import functional
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from mens_core.text.lab import END_OF_TEXT_ID, TURN_END_ID, write_lab_tokenizer


class Windows:
    """Endless training windows: each pass cuts the stream at a new offset and shuffles the pieces."""

    def __init__(self, stream: torch.Tensor, tokens: int, seed: int) -> None:
        self._stream, self._tokens = stream, tokens
        self._random = random.Random(seed + tokens)  # noqa: S311 (an order, not a secret)
        self._starts: list[int] = []

    def take(self, rows: int) -> torch.Tensor:
        """The next ``rows`` windows with the token that follows each, int64 of shape (rows, tokens + 1)."""
        if len(self._starts) < rows:
            self._starts = list(
                range(self._random.randrange(self._tokens), len(self._stream) - self._tokens, self._tokens)
            )
            self._random.shuffle(self._starts)
        chosen = [self._starts.pop() for _ in range(rows)]
        return torch.stack([self._stream[start : start + self._tokens + 1] for start in chosen])


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
    )
    model = GPT2LMHeadModel(config)
    initialise(model, recipe)
    return model


@torch.no_grad()
def initialise(model: GPT2LMHeadModel, recipe: Recipe) -> None:
    """Blocks start as the identity; positions are fixed sinusoids (Vaswani et al. 2017, section 3.5).

    GPT-2's own start left the loss at that of a bigram table for over 600 steps: a thousand learnt positions,
    each rarely seen, drown in the noise of their updates before attention can use them.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            weight.normal_(std=recipe.width**-0.5)
        elif name.endswith("c_proj.weight"):
            weight.zero_()
    positions = model.transformer.wpe.weight
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, recipe.width, 2) / recipe.width)
    angles = torch.arange(recipe.window_tokens)[:, None] * frequencies
    positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
    # As strong as the tokens.
    positions.mul_(recipe.embedding_std * math.sqrt(2))
    positions.requires_grad_(requires_grad=False)
    model.transformer.wte.weight.normal_(std=recipe.embedding_std)


def loss_of(model: GPT2LMHeadModel, rows: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    """Mean cross-entropy in nats over the predicted tokens of ``rows``, shape (rows, tokens + 1)."""
    positions = torch.arange(first_position, first_position + rows.shape[1] - 1)[None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], position_ids=positions, use_cache=False).logits
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


def build_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; each group remembers its peak rate."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in trained if ".h." in name and weight.ndim == 2]
    rest = [weight for name, weight in trained if not (".h." in name and weight.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_learning_rate, betas=recipe.betas, weight_decay=0.0)
    for group in [*muon.param_groups, *adam.param_groups]:
        group["peak"] = group["lr"]
    return [muon, adam]


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


class Trainer:
    """One run of the recipe."""

    def __init__(self, recipe: Recipe, streams: Streams) -> None:
        self.recipe, self.streams = recipe, streams
        train, self._held_out = (torch.tensor(part, dtype=torch.long) for part in (streams.train, streams.held_out))
        self._windows = {tokens: Windows(train, tokens, recipe.seed) for _, tokens in recipe.stages}
        self._offsets = random.Random(recipe.seed)  # noqa: S311 (positions, not a secret)
        self.model = build_model(recipe)
        self._optimizers = build_optimizers(self.model, recipe)
        self._running = float("nan")
        self._curve: list[tuple[int, float, float]] = []

    def run(self, output: Path, snapshots: Path | None) -> None:
        """Train, printing one line per evaluation, and leave the finished folder at ``output``."""
        began = time.monotonic()
        for done in range(1, self.recipe.steps + 1):
            loss = self._step(done - 1)
            self._running = loss if math.isnan(self._running) else 0.98 * self._running + 0.02 * loss
            last = done == self.recipe.steps
            if last or done == 50 or done % self.recipe.evaluate_every_steps == 0:
                text = self._report(done, time.monotonic() - began, last=last)
                if last:
                    save(self.model, output, self.recipe, text)
                elif snapshots is not None:
                    save(self.model, snapshots / f"step-{done:05d}", self.recipe, text)

    def _step(self, step: int) -> float:
        recipe, tokens = self.recipe, self.recipe.stage_tokens(step)
        total = 0.0
        for _ in range(recipe.micro_batches):
            rows = self._windows[tokens].take(recipe.micro_batch_tokens // tokens)
            first = self._offsets.randint(0, recipe.window_tokens - tokens)
            loss = loss_of(self.model, rows, first) / recipe.micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * recipe.rate_share(step)
            optimizer.step()
            optimizer.zero_grad()
        return total

    def _report(self, done: int, seconds: float, *, last: bool) -> str:
        sample = None if last else self.recipe.evaluate_windows
        held_out = evaluate(self.model, self._held_out, self.recipe, sample)
        self._curve.append((done, self._running, held_out))
        losses = f"train {self._running:.4f}  held-out {held_out:.4f} nats/byte"
        print(f"step {done}/{self.recipe.steps}  {losses}  {seconds:.0f} s", flush=True)
        return card(self.recipe, self.streams, self._curve, seconds, versions())


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
    Trainer(recipe, build_streams(recipe.seed)).run(arguments.output, arguments.snapshots)


if __name__ == "__main__":
    main()
