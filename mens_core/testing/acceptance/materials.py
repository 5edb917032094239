"""The data of the rows: the runbook's ramps and fixtures, tiny models that can be trained, a corpus."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mens_core
from mens_core.artifacts.tensors import write_tensors
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import read_layout
from mens_core.random_model import Size, write_random_model, write_random_weights

__all__ = [
    "EMBEDDING",
    "TINY",
    "merge_fixture",
    "ramp",
    "strict_fixture",
    "word_level",
    "write_corpus",
    "write_rows",
    "write_trainable",
]

TINY = Size(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, inner=160, positions=512)
EMBEDDING = "model.embed_tokens.weight"


def ramp(start: float, step: float, *shapes: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Arrays that continue one ramp, made by adding the step again and again in float32, as the runbook's tests do."""
    value, numbers = np.float32(start), []
    for _ in range(sum(int(np.prod(shape)) for shape in shapes)):
        numbers.append(value)
        value = np.float32(value + np.float32(step))
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(np.array(numbers, np.float32), cuts)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def word_level(path: Path, words: int) -> None:
    """Write a tokenizer of the words w0, w1, …; every other text is w0."""
    model = {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(words)}, "unk_token": "w0"}
    content = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    path.write_text(json.dumps(content), encoding="utf-8")


def strict_fixture(folder: Path, keep: Collection[str] | None, hidden: int = 7) -> Path:
    """The runbook's Qwen2 folder of row 1d: hidden 7, one head, two layers, a vocabulary of 5.

    Args:
        folder: does not exist yet.
        keep: which tensors the weight file has; None for all.
        hidden: width; the runbook's 7 makes a head that cannot be rotated in pairs, which an even number can.

    Returns:
        The folder.
    """
    folder.mkdir()
    config = {"model_type": "qwen2", "hidden_size": hidden, "num_attention_heads": 1, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 2, "intermediate_size": 14, "vocab_size": 5, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    draw = np.random.default_rng(0).standard_normal
    shapes = tensor_shapes(read_layout(folder))
    tensors = {name: draw(shape, np.float32) for name, shape in shapes.items() if keep is None or name in keep}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    word_level(folder / "tokenizer.json", 5)
    return folder


def write_trainable(folder: Path, family: str, text: Sequence[Path]) -> Path:
    """A tiny seeded model whose logits reach about 10, so that a few steps show, with a tokenizer trained on text.

    Args:
        folder: does not exist yet.
        family: one of ``mens_core.hf.layout.GRAPHS``.
        text: files.

    Returns:
        The folder.
    """
    write_random_model(folder, arch=family, text=text, vocab_size=512, seed=7)
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    write_random_weights(folder, arch=family, size=TINY, vocab_size=vocabulary, seed=7, like_trained=True)
    return folder


def write_corpus(folder: Path) -> Path:
    """Pairs from some of this package's own source, mixed with the package's tool traces.

    Args:
        folder: exists.

    Returns:
        The folder with train.jsonl and eval.jsonl.
    """
    package = Path(mens_core.__file__).parent
    mens_core.write_pairs([package / "text"], folder / "pairs", max_chars=260, eval_fraction=0.0)
    mix = folder / "mix.yaml"
    traces = json.dumps(str(package / "mixes" / "tool_traces.jsonl"))
    mix.write_text(
        "sources:\n  - {path: pairs/train.jsonl, weight: 3}\n"
        f"  - {{path: {traces}, weight: 1, record_format: tool_trace}}\n"
        "output: data/train.jsonl\neval_fraction: 0.05\n",
        encoding="utf-8",
    )
    mens_core.mix(mix)
    return folder / "data"


def merge_fixture(
    folder: Path, version: int, name: str, spelling: str = "", changes: Mapping[str, Any] | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """The runbook's adapter of row 10: width 3, vocabulary 4, rank 2, alpha 4, A and B all ones, W = 0.1 i.

    Args:
        folder: exists; gets base.safetensors, adapter.safetensors and meta.json.
        version: of the description.
        name: of its format.
        spelling: behind the names of the tensors, such as ``.weight``.
        changes: fields of the description that differ.

    Returns:
        The base's weight, and the words of ``merge-qlora`` that name base, adapter and description.
    """
    weight = (0.1 * np.arange(12, dtype=np.float32)).reshape(4, 3)
    write_tensors(folder / "base.safetensors", {"wte.weight": weight, "other.weight": weight}, {})
    pair = {f"lm_head.lora_a{spelling}": np.ones((2, 3), np.float32)}
    pair |= {f"lm_head.lora_b{spelling}": np.ones((4, 2), np.float32)}
    write_tensors(folder / "adapter.safetensors", pair, {})
    meta: dict[str, Any] = {"format": name, "version": version, "layer_order": ["lm_head"], "rank": 2, "alpha": 4}
    meta |= {"base_key_map": {"lm_head": "wte.weight"}, "vocab": 4, "d_model": 3}
    meta |= {"embed_key": "wte.weight"} if version == 2 else {"adapter_method": "qlora", "quant": {}}
    (folder / "meta.json").write_text(json.dumps(meta | dict(changes or {})), encoding="utf-8")
    files = {"--base-shard": "base.safetensors", "--adapter": "adapter.safetensors", "--meta": "meta.json"}
    return weight, [word for flag, file in files.items() for word in (flag, str(folder / file))]
