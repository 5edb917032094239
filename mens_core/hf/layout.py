"""config.json → Layout: the numbers that fix a decoder's graph.

Families whose tensors the core knows are looked up by their exact ``model_type``. Any other type gives a layout
without a family, read as far as common spellings go: a backend that can build it by other means may still offer it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ModelError
from mens_core.hf.families import REGISTRY, UNKNOWN
from mens_core.hf.files import find_file, read_json
from mens_core.hf.values import Values, is_positive

__all__ = ["FAMILIES", "GRAPHS", "Layout", "LinearAttention", "read_layout"]

FAMILIES = tuple(REGISTRY)
"""Model types whose tensors the core knows by name and shape."""
GRAPHS = ("gpt2", "llama", "qwen2", "qwen3")
"""Families whose whole graph the core describes; ``init-model`` and the JAX backend build these."""

# The deepest published decoders have below two hundred; names are made for every layer.
_MOST_LAYERS = 10_000


@attrs.frozen(kw_only=True)
class LinearAttention:
    """The numbers of layers of type ``linear_attention``.

    Invariants: all are positive; ``value_heads`` is a multiple of ``key_heads``.

    Attributes:
        key_heads: heads of query and key.
        value_heads: heads of value, gate and state.
        key_head_dim: width of one key head.
        value_head_dim: width of one value head.
        conv_kernel: tokens the short convolution sees.
    """

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int


@attrs.frozen(kw_only=True)
class Layout:
    """The numbers of a decoder-only transformer, named after Llama's config.

    Invariants: all counts are positive; ``num_heads`` is a multiple of ``num_kv_heads``; ``layer_types`` has one
    entry a layer.

    Attributes:
        model_type: as in config.json.
        architectures: class names as in config.json; empty if it names none.
        family: one of ``FAMILIES``, or None if the core does not know the tensors.
        hidden_size: width D of the residual stream.
        num_layers: number of decoder blocks.
        layer_types: what each block attends with, such as ``full_attention``.
        num_heads: query heads H; 1 for an unknown family that states none.
        num_kv_heads: key/value heads K.
        head_dim: width E of one head; H·E may differ from D.
        linear: the numbers of linear attention; None for a family without.
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
    architectures: tuple[str, ...]
    family: str | None
    hidden_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear: LinearAttention | None
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
    def namespace_prefix(self) -> str | None:
        """What stands before the layer's number in the inventory's names; None for an unknown family."""
        return REGISTRY[self.family].namespace if self.family is not None else None

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary parameters in transformers 5's spelling: ``rope_type``, ``rope_theta`` and the scaling's own.

        Older files keep ``rope_theta`` and ``rope_scaling`` at the top level; both spellings are read.
        """
        text = _text_part(self.config)
        given = text.get("rope_parameters") or text.get("rope_scaling") or {}
        rope = {
            "rope_type": given.get("type", "default"),
            "rope_theta": text.get("rope_theta", 10000.0),
            **given,
        }
        rope.pop("type", None)
        return rope


def read_layout(folder: Path) -> Layout:
    """Read ``config.json`` of a model folder.

    Raises:
        ModelError: if the file is missing, may not be opened, is not a JSON object, lacks a number or contradicts
            itself; all problems of one file are told together.
    """
    path = find_file(folder, "config.json")
    if path is None:
        raise ModelError(
            "the model folder has no config.json, so its architecture cannot be validated",
            where=folder / "config.json",
            expected="config.json, needed for architecture validation",
            fix="point --model at a folder saved by transformers' save_pretrained",
        )
    expected = 'a JSON object with "model_type": "llama" or similar'
    config = read_json(path, expected=expected)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json does not name a model_type", where=path, expected=expected)
    values = _values(config)
    layout = _layout(config, values)
    _check_rope(values)
    if not values.problems:
        _check(layout, values)
    if values.problems:
        count = f"{len(values.problems)} problem{'s' if len(values.problems) > 1 else ''}"
        listing = "\n".join(f"  - {problem}" for problem in values.problems)
        raise ModelError(f"config.json has {count}:\n{listing}", where=path)
    return layout


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder."""
    row, text = REGISTRY.get(config.get("model_type", "")), config.get("text_config")
    nested = row.nested if row is not None else "hidden_size" not in config
    return text if nested and isinstance(text, dict) else config


def _values(config: Mapping[str, Any]) -> Values:
    text, row = _text_part(config), REGISTRY.get(config["model_type"])
    if row is not None:
        values = Values(text, row)
        if row.nested and text is config:
            values.refuse("text_config", config.get("text_config"), "an object with the decoder's values")
        return values
    # The defaults of a decoder the core knows hold inside a model of several parts that it does not know.
    inner = text.get("model_type")
    return Values(text, REGISTRY.get(inner, UNKNOWN) if isinstance(inner, str) else UNKNOWN)


def _layout(config: Mapping[str, Any], values: Values) -> Layout:
    row, model_type = values.family, config["model_type"]
    width, heads = values.count("hidden_size"), values.count("num_attention_heads")
    layers = values.count("num_hidden_layers", most=_MOST_LAYERS)
    attention_bias = _bias(values, "attention_bias")
    return Layout(
        model_type=model_type,
        architectures=values.strings("architectures", config) or (),
        family=model_type if model_type in REGISTRY else None,
        hidden_size=width,
        num_layers=layers,
        layer_types=_layer_types(values, layers),
        num_heads=heads,
        num_kv_heads=values.count("num_key_value_heads", heads),
        head_dim=values.count("head_dim", max(1, width // heads)),
        linear=_linear(values) if row.hybrid else None,
        intermediate_size=values.count("intermediate_size", 4 * width),
        vocab_size=values.count("vocab_size"),
        max_positions=values.count("max_position_embeddings"),
        norm_eps=values.epsilon("rms_norm_eps"),
        tied=values.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=row.biases.get("output_bias", attention_bias),
        mlp_bias=_bias(values, "mlp_bias"),
        config=config,
    )


def _bias(values: Values, key: str) -> bool:
    biases = values.family.biases
    return biases[key] if key in biases else values.flag(key)


def _linear(values: Values) -> LinearAttention:
    return LinearAttention(
        key_heads=values.count("linear_num_key_heads"),
        value_heads=values.count("linear_num_value_heads"),
        key_head_dim=values.count("linear_key_head_dim"),
        value_head_dim=values.count("linear_value_head_dim"),
        conv_kernel=values.count("linear_conv_kernel_dim"),
    )


def _layer_types(values: Values, layers: int) -> tuple[str, ...]:
    """What config.json lists, or the family's rule."""
    row, text = values.family, values.text
    given = values.strings("layer_types", text)
    if given is not None:
        return given
    if row.windowed and values.flag("use_sliding_window") and text.get("sliding_window", 4096) is not None:
        full = min(layers, values.count("max_window_layers", 28, least=0))
        return ("full_attention",) * full + ("sliding_attention",) * (layers - full)
    period = row.period if row.period_key is None else values.count(row.period_key, row.period)
    return tuple("full_attention" if n % period == 0 else row.other_layers for n in range(1, layers + 1))


def _check_rope(values: Values) -> None:
    scopes: list[Mapping[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.text.get(key)
        if rope is not None and not isinstance(rope, dict):
            values.refuse(key, rope, "an object")
        elif rope:
            # Some families keep one set of parameters for each type of layer.
            scopes += [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for scope in scopes:
        for key in ("type", "rope_type"):
            if scope.get(key) is not None and not isinstance(scope[key], str):
                values.refuse(key, scope[key], "a text")
    for scope in [values.text, *scopes]:
        theta = scope.get("rope_theta")
        if theta is not None and not is_positive(theta):
            values.refuse("rope_theta", theta, "a positive number")


def _check(layout: Layout, values: Values) -> None:
    """Whether numbers that are right each for itself fit each other."""
    row, text, refused = values.family, values.text, values.problems.append
    width, heads, linear = layout.hidden_size, layout.num_heads, layout.linear
    if heads % layout.num_kv_heads:
        refused(f"num_attention_heads {heads} do not divide into num_key_value_heads {layout.num_kv_heads}")
    if len(layout.layer_types) != layout.num_layers:
        refused(f"layer_types has {len(layout.layer_types)} entries, but num_hidden_layers is {layout.num_layers}")
    if row is UNKNOWN:
        return
    stated = row.spellings.get("head_dim") != () and text.get("head_dim", row.defaults.get("head_dim")) is not None
    if not stated and width % heads:
        wide, many = (row.spellings.get(key, (key,))[0] for key in ("hidden_size", "num_attention_heads"))
        refused(f"{wide} {width} is not a multiple of {many} {heads}")
    if stated and row.rotary and layout.head_dim % 2:
        values.refuse("head_dim", layout.head_dim, "an even number, for rotary positions turn pairs,")
    kinds = set(layout.layer_types)
    if row.hybrid and kinds - {"full_attention", "linear_attention"}:
        values.refuse("layer_types", sorted(kinds), "full_attention or linear_attention")
    if not row.hybrid and "linear_attention" in kinds:
        values.refuse("layer_types", sorted(kinds), f"no linear_attention in {layout.model_type}")
    if linear is not None and linear.value_heads % linear.key_heads:
        refused(
            f"linear_num_value_heads {linear.value_heads} do not divide into linear_num_key_heads {linear.key_heads}"
        )
