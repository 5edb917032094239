"""A seeded, randomly initialised Hugging Face folder: real input for tests and for people without a network.

Written with NumPy alone; transformers opens the folder like any other. Matrices are N(0, 0.02²), biases zero,
norms one, as transformers initialises them. Each tensor comes from a Philox generator keyed by sha256 of (seed,
tensor name), so that its values do not depend on the other tensors. The tokenizer is a byte-level BPE trained
on given text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.files import write_json
from mens_core.artifacts.tensors import write_tensors
from mens_core.atomic import appearing
from mens_core.chat.open_chat import TURN_END, TURN_START
from mens_core.errors import DataError, ModelError
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import GRAPHS, read_layout
from mens_core.text.lab import END_OF_TEXT

__all__ = ["SIZES", "Size", "write_random_model", "write_random_weights"]

_INITIAL_STD = 0.02


@attrs.frozen
class Size:
    """Width, depth and reach of a model; heads share ``head_dim``, which need not be width / heads."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    positions: int


SIZES = {
    "tiny": Size(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, inner=160, positions=1024),
    "small": Size(width=256, layers=6, heads=8, kv_heads=4, head_dim=32, inner=688, positions=1024),
}


def write_random_model(
    output: str | Path,
    *,
    arch: str,
    size: str = "tiny",
    text: Sequence[str | Path],
    vocab_size: int = 512,
    seed: int = 42,
) -> None:
    """Write config.json, model.safetensors, tokenizer.json and its companions.

    The folder appears whole: it is built beside its place and renamed.

    Args:
        output: a folder that does not exist yet, or is empty.
        arch: one of ``GRAPHS``.
        size: a name in ``SIZES``.
        text: UTF-8 files the tokenizer is trained on.
        vocab_size: most tokens of the vocabulary, at least 259 (256 bytes and three control tokens).
        seed: of the weights.

    Raises:
        ModelError: an unknown architecture or size, or the folder is in use.
        DataError: a text file is missing or none is given.
    """
    if arch not in GRAPHS:
        raise ModelError(f"there is no architecture {arch!r}", expected=f"one of {', '.join(GRAPHS)}")
    if size not in SIZES:
        raise ModelError(f"there is no size {size!r}", expected=f"one of {', '.join(SIZES)}")
    texts = [Path(path) for path in text]
    missing = [path for path in texts if not path.is_file()]
    if missing or not texts:
        raise DataError("the tokenizer needs text files", where=", ".join(map(str, missing)) or "none given")
    with appearing(Path(output)) as building:
        tokens = _write_tokenizer(building, texts, vocab_size, SIZES[size].positions)
        write_random_weights(building, arch=arch, size=SIZES[size], vocab_size=tokens, seed=seed)


def write_random_weights(
    folder: Path,
    *,
    arch: str,
    size: Size,
    vocab_size: int,
    seed: int = 42,
    like_trained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, float32, of a model of any size; for measuring, no tokenizer is needed.

    Args:
        folder: exists.
        arch: one of ``GRAPHS``.
        size: of the model.
        vocab_size: rows of the embedding.
        seed: of the weights.
        like_trained: whether matrices keep the size of what they multiply, so that logits reach about 10, and
            biases and norms differ from zero and one. On logits near zero every mistake of a graph is small.
        config: further or other values of config.json.
    """
    write_json(folder / "config.json", _config(arch, size, vocab_size) | dict(config or {}))
    shapes, draw = tensor_shapes(read_layout(folder)), _trained if like_trained else _initial
    tensors = {name: draw(name, shape, seed) for name, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _initial(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return _normal(name, shape, seed) * np.float32(_INITIAL_STD)


def _trained(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    normal = _normal(name, shape, seed)
    if len(shape) == 1:
        return normal / np.float32(8) + np.float32(not name.endswith(".bias"))
    embedding = name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight"))
    return normal * np.float32(0.5 if embedding else shape[-1] ** -0.5)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)


def _write_tokenizer(folder: Path, text: Sequence[Path], vocab_size: int, positions: int) -> int:
    """Train and write; returns the size of the vocabulary."""
    # heavy: only this function needs the trainer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": positions,
        },
    )
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _config(arch: str, size: Size, vocab_size: int) -> dict[str, Any]:
    common = {"model_type": arch, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float32"}
    if arch == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": size.width,
            "n_layer": size.layers,
            "n_head": size.heads,
            "n_inner": size.inner,
            "n_positions": size.positions,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    return common | {
        "architectures": [f"{arch.capitalize()}ForCausalLM"],
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.inner,
        "max_position_embeddings": size.positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": arch != "llama",
    }
