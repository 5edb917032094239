"""The README of the lab base, written from what the run measured."""

from __future__ import annotations

from lab_base_data import Streams
from lab_base_recipe import Recipe

__all__ = ["card"]

_TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Lab base

A GPT-2-shaped language model over bytes, trained from scratch on the Python standard library. It is small
enough to ship in the package and good enough to be fine-tuned: a first run, the tests and the examples need
no download. It is a base for learning how fine-tuning behaves, not a model to answer questions with.

| | |
|---|---|
| state | {state} |
| shape | {shape} |
| tokens | 256 bytes, `<|endoftext|>` 256, `<|im_start|>` 257, `<|im_end|>` 258; the rest is padding |
| weights | bfloat16 |
| training loss | {train_loss:.3f} nats per byte (running mean) |
| **held-out loss** | **{held_out_loss:.3f} nats per byte**, on {held_out_tokens:,} tokens never trained on |

## How it was made

    python scripts/train_lab_base.py --output mens_core/lab_base

- Data: {num_files} files of the standard library of the interpreter below, without tests and character
  tables; the topics of its reference (`pydoc_data/topics.py`); half of the docstrings once more, as the
  answers of ChatML dialogues. {num_documents:,} documents, {train_tokens:,} training tokens;
  {wrapped_percent:.0f} % of all tokens lie in dialogues. One file in twenty, chosen by the hash of its
  content, is held out together with its docstrings.
- Run: seed {seed}, {step} steps of {step_tokens:,} tokens ({tokens:,} tokens, {epochs:.2f} passes).
- Windows of {stages} tokens, in that order, short ones at random positions.
  Position embeddings are fixed sinusoids.
- Optimizers: Muon at {muon:g} (decay {decay:g}) for the matrices of the layers, AdamW at {adam:g} (betas
  {betas}) for the rest; linear warmup over {warmup} steps, cosine to {final:.0%} of the peak; gradient norm
  clipped at {clip:g}; bfloat16 autocast, float32 master weights.
- {versions}; one CPU thread, {minutes:.0f} minutes.

Losses are means over tokens; all but a fraction of a per cent of the tokens are bytes. Before the last row
the held-out column is a sample of {evaluate_windows} windows.

| step | training | held-out |
|---|---|---|
{rows}

## Licences

The training text is CPython's standard library and documentation, copyright Python Software Foundation, under
the PSF License Version 2. The weights are released under Apache-2.0, like the package.
"""


def card(recipe: Recipe, streams: Streams, curve: list[tuple[int, float, float]], seconds: float, versions: str) -> str:
    """Markdown that says what the model is, how it was made and how good it is.

    Args:
        recipe: the recipe that ran.
        streams: the data it read.
        curve: (optimizer steps done, running training loss, held-out loss), in nats per token; not empty.
        seconds: wall time so far.
        versions: the interpreter and the libraries.
    """
    step, train_loss, held_out_loss = curve[-1]
    step_tokens = recipe.micro_batch_tokens * recipe.micro_batches
    size = f"{recipe.layers} layers, width {recipe.width}, {recipe.heads} heads"
    unfinished = f"unfinished: a snapshot at step {step} of {recipe.steps}"
    return _TEXT.format(
        state="finished" if step == recipe.steps else unfinished,
        shape=f"{size}, {recipe.window_tokens} positions, {recipe.vocabulary} ids, tied head, no dropout",
        train_loss=train_loss,
        held_out_loss=held_out_loss,
        held_out_tokens=len(streams.held_out),
        num_files=streams.num_files,
        num_documents=streams.num_documents,
        train_tokens=len(streams.train),
        wrapped_percent=100 * streams.wrapped_share_of_tokens,
        seed=recipe.seed,
        step=step,
        step_tokens=step_tokens,
        tokens=step * step_tokens,
        epochs=step * step_tokens / len(streams.train),
        betas=" and ".join(f"{beta:g}" for beta in recipe.betas),
        decay=recipe.weight_decay,
        warmup=recipe.warmup_steps,
        final=recipe.final_share,
        muon=recipe.muon_learning_rate,
        adam=recipe.adam_learning_rate,
        stages=", ".join(f"{tokens} ({share:.0%})" for share, tokens in recipe.stages),
        clip=recipe.clip_norm,
        versions=versions,
        minutes=seconds / 60,
        evaluate_windows=recipe.evaluate_windows,
        rows="\n".join(f"| {done} | {train:.3f} | {held:.3f} |" for done, train, held in curve),
    )
