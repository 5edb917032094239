"""config.json → Layout: the numbers that fix a decoder's graph.

The four families whose graph the core knows are looked up by their exact ``model_type``. Any other type gives
a layout without a family: a backend that can build it by other means may still offer it, the others say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ModelError

__all__ = ["FAMILIES", "GRAPHS", "Layout", "read_layout"]

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
GRAPHS = ("gpt2", "llama", "qwen2", "qwen3")
"""Families whose whole graph the core describes; ``init-model`` and the JAX backend build these."""

# Other families' words for Llama's, so that a backend which knows such a model by other means can be asked.
_SPELLINGS = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "d_ff", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length"),
}


@attrs.frozen(kw_only=True)
class Layout:
    """The numbers of a decoder-only transformer, named after Llama's config.

    Invariants: all counts are positive; ``num_heads`` is a multiple of ``num_kv_heads``.

    Attributes:
        model_type: as in config.json.
        family: one of ``FAMILIES``, or None if the core does not know the graph.
        hidden_size: width D of the residual stream.
        num_layers: number of decoder blocks.
        num_heads: query heads H; 1 for an unknown family that states none.
        num_kv_heads: key/value heads K.
        head_dim: width E of one head; H·E may differ from D.
        intermediate_size: width F inside the feed-forward part.
        vocab_size: rows V of the embedding.
        max_positions: longest row the model was built for, in tokens.
        norm_eps: epsilon of the layer norms.
        tied: whether the head is the embedding.
        attention_bias: bias on q, k and v.
        output_bias: bias on the attention's output projection.
        mlp_bias: bias on the feed-forward linears.
        config: the whole config.json, for what only one family has.
    """

    model_type: str
    family: str | None
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    config: Mapping[str, Any]

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary parameters in transformers 5's spelling: ``rope_type``, ``rope_theta`` and the scaling's own.

        Older files keep ``rope_theta`` and ``rope_scaling`` at the top level; both spellings are read.
        """
        given = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        rope = {
            "rope_type": given.get("type", "default"),
            "rope_theta": self.config.get("rope_theta", 10000.0),
            **given,
        }
        rope.pop("type", None)
        return rope


def read_layout(folder: Path) -> Layout:
    """Read ``config.json`` of a model folder.

    Raises:
        ModelError: if the file is missing, is not a JSON object, lacks a number or contradicts itself.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "the model folder has no config.json, so its architecture cannot be validated",
            where=path,
            expected="config.json, needed for architecture validation",
            fix="point --model at a folder saved by transformers' save_pretrained",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=path) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            "config.json does not name a model_type",
            where=path,
            expected='a JSON object with "model_type": "llama" or similar',
        )
    return _gpt2_layout(config, path) if config["model_type"] == "gpt2" else _llama_like_layout(config, path)


def _gpt2_layout(config: dict[str, Any], path: Path) -> Layout:
    number = _Numbers(config, path)
    width, heads = number("n_embd"), number("n_head")
    return _checked(
        Layout(
            model_type="gpt2",
            family="gpt2",
            hidden_size=width,
            num_layers=number("n_layer"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            intermediate_size=number("n_inner", 4 * width),
            vocab_size=number("vocab_size"),
            max_positions=number("n_positions", 1024),
            norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
            tied=bool(config.get("tie_word_embeddings", True)),
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            config=config,
        ),
        path,
    )


def _llama_like_layout(config: dict[str, Any], path: Path) -> Layout:
    model_type = config["model_type"]
    known = model_type in FAMILIES
    number = _Numbers(config, path, {} if known else _SPELLINGS)
    # A state-space model has no heads; 1 says so without a special case in what divides by them.
    width, heads = number("hidden_size"), number("num_attention_heads", None if known else 1)
    bias = bool(config.get("attention_bias", False))
    return _checked(
        Layout(
            model_type=model_type,
            family=model_type if known else None,
            hidden_size=width,
            num_layers=number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", 128 if model_type == "qwen3" else width // heads),
            intermediate_size=number("intermediate_size", 4 * width),
            vocab_size=number("vocab_size"),
            max_positions=number("max_position_embeddings", 2048),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            # Qwen2 has these biases by definition of the family; its config does not say so.
            attention_bias=True if model_type == "qwen2" else bias,
            output_bias=False if model_type == "qwen2" else bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            config=config,
        ),
        path,
    )


class _Numbers:
    """Reads positive whole numbers out of a config, naming the file and key of each bad one."""

    def __init__(
        self, config: Mapping[str, Any], path: Path, spellings: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.config, self.path, self.spellings = config, path, spellings or {}

    def __call__(self, key: str, default: int | None = None) -> int:
        given = (self.config.get(name) for name in (key, *self.spellings.get(key, ())))
        value = next((number for number in given if number is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"config.json has no usable {key}",
                where=f"{self.path}, key {key}: {value!r}",
                expected="a positive whole number",
            )
        return value


def _checked(layout: Layout, path: Path) -> Layout:
    if layout.num_heads % layout.num_kv_heads:
        raise ModelError(
            "the query heads do not divide into the key/value heads",
            where=f"{path}: {layout.num_heads} heads, {layout.num_kv_heads} key/value heads",
        )
    if layout.family == "gpt2" and layout.hidden_size % layout.num_heads:
        raise ModelError(
            "n_embd is not a multiple of n_head", where=f"{path}: {layout.hidden_size} and {layout.num_heads}"
        )
    return layout
