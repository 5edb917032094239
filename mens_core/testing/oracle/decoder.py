"""The decoder of each family, out of a model folder.

::

    gpt2     h + attn(ln_1(h)),  then  h + mlp(ln_2(h));  learned positions; biases everywhere
    others   h + self_attn(input_layernorm(h)),  then  h + mlp(post_attention_layernorm(h));  rotary positions

Source: transformers' modeling files of GPT-2, Llama, Qwen2 and Qwen3, version 5. Shape letters: T tokens, V vocabulary,
D width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.tensors import open_tensors
from mens_core.errors import ModelError
from mens_core.exchange import Batch
from mens_core.hf.fit import HEAD
from mens_core.hf.keymap import canonical_name, family_of, linear_shapes, tensor_shapes
from mens_core.hf.layout import GRAPHS, Layout, read_layout
from mens_core.hf.whole import untrained_row
from mens_core.testing.oracle.layers import ACTIVATIONS, attention, layer_norm, rms_norm
from mens_core.testing.oracle.linear import linear
from mens_core.testing.oracle.loss import cross_entropy
from mens_core.testing.oracle.rotary import inverse_frequencies, rotate

__all__ = ["Oracle", "Stored", "read_base"]

Array = NDArray[Any]
Adapter = Mapping[str, Array]

Stored = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A linear layer's weight, (out, in), to what its storage keeps of it."""


def read_base(folder: Path, layout: Layout, stored: Stored | None = None) -> dict[str, NDArray[np.float64]]:
    """Read the weights of a folder, linear layers as (out, in) whatever the family stores.

    Args:
        folder: config.json and safetensors.
        layout: of that config.json.
        stored: applied to every linear layer but the head, as NF4 storage is; None for none.

    Returns:
        Canonical tensor name → float64.

    Raises:
        ModelError: if the folder lacks a tensor, or has it in another shape.
    """
    tensors, shapes = open_tensors(folder), tensor_shapes(layout)
    names = {canonical_name(layout, name): name for name in tensors}
    missing = sorted(set(shapes) - set(names))
    if missing:
        raise ModelError(f"the model has no tensor {missing[0]}", where=folder)
    linears = {f"{path}.weight" for path in linear_shapes(layout)}
    base = {}
    for name, shape in shapes.items():
        tensor = np.asarray(tensors[names[name]])
        if tensor.shape != shape:
            raise ModelError(f"tensor {name} has shape {tensor.shape}", where=folder, expected=str(shape))
        if name in linears:
            tensor = tensor.T if family_of(layout).conv1d else tensor
            tensor = stored(tensor.astype(np.float32)) if stored is not None else tensor
        base[name] = tensor.astype(np.float64)
    return base


@attrs.frozen(kw_only=True, eq=False)
class Oracle:
    """A base with the scales of its adapter. The adapter itself is an argument: a function's derivative is by it.

    What an adapter has under the name of a tensor of the base takes its place.

    Attributes:
        layout: of the model.
        base: from ``read_base``.
        scale: s of every adapter, dimensionless.
        scales: module path → s of those that have another.
    """

    layout: Layout
    base: Mapping[str, Array]
    scale: float
    scales: Mapping[str, float] = attrs.field(factory=dict)

    @classmethod
    def open(
        cls, folder: Path, *, scale: float, stored: Stored | None = None, scales: Mapping[str, float] | None = None
    ) -> Oracle:
        """Read a model folder.

        Args:
            folder: config.json and safetensors.
            scale: s of the adapter.
            stored: as ``read_base`` takes it.
            scales: module path → s of layers that have another.

        Raises:
            ModelError: if the family is not one of ``GRAPHS``, or the folder cannot be read.
        """
        layout = read_layout(folder)
        if layout.family not in GRAPHS:
            raise ModelError(
                f"the specification has no model_type {layout.model_type!r}",
                where=folder,
                expected=f"one of {', '.join(GRAPHS)}",
            )
        return cls(layout=layout, base=read_base(folder, layout, stored), scale=scale, scales=scales or {})

    def logits(self, adapter: Adapter, batch: Batch) -> Array:
        """``mens_forward``.

        Args:
            adapter: by the names all backends share, real or complex; an empty one is the base alone.
            batch: packed rows.

        Returns:
            (T, V) float64, or complex128 for a complex adapter.
        """
        gpt2 = self.layout.family == "gpt2"
        base = {**self.base, **adapter}
        table = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
        hidden = base[table][batch.input_ids]
        # The padding token's row is no variable.
        fixed = batch.input_ids == untrained_row(self.layout)
        hidden = np.where(fixed[:, None], hidden.real, hidden)
        if gpt2:
            hidden = hidden + base["transformer.wpe.weight"][batch.positions]
        block = self._gpt2_block if gpt2 else self._llama_block
        for layer in range(self.layout.num_layers):
            hidden = block(layer, hidden, adapter, batch)
        hidden = self._norm("transformer.ln_f" if gpt2 else "model.norm", hidden, adapter)
        logits: Array = hidden @ base.get(HEAD, self.base[table]).T
        return logits

    def loss(self, adapter: Adapter, batch: Batch) -> Any:
        """``mens_loss``, without the count: the sum over the supervised tokens, in nats."""
        return cross_entropy(self.logits(adapter, batch), batch.targets)

    def _gpt2_block(self, layer: int, hidden: Array, adapter: Adapter, batch: Batch) -> Array:
        path = f"transformer.h.{layer}"
        mixed = self._linear(f"{path}.attn.c_attn", self._norm(f"{path}.ln_1", hidden, adapter), adapter)
        query, key, value = (
            part.reshape(len(hidden), -1, self.layout.head_dim) for part in np.split(mixed, 3, axis=-1)
        )
        config = self.layout.config
        scale = self.layout.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        scale /= layer + 1 if config.get("scale_attn_by_inverse_layer_idx", False) else 1
        attended = attention(query, key, value, batch.row_lengths.tolist(), scale, None)
        hidden = hidden + self._linear(f"{path}.attn.c_proj", attended.reshape(hidden.shape), adapter)
        inner = self._linear(f"{path}.mlp.c_fc", self._norm(f"{path}.ln_2", hidden, adapter), adapter)
        inner = ACTIVATIONS[config.get("activation_function", "gelu_new")](inner)
        return hidden + self._linear(f"{path}.mlp.c_proj", inner, adapter)

    def _llama_block(self, layer: int, hidden: Array, adapter: Adapter, batch: Batch) -> Array:
        path = f"model.layers.{layer}"
        normed = self._norm(f"{path}.input_layernorm", hidden, adapter)
        attended = self._llama_attention(layer, normed, adapter, batch)
        hidden = hidden + self._linear(f"{path}.self_attn.o_proj", attended, adapter)
        normed = self._norm(f"{path}.post_attention_layernorm", hidden, adapter)
        gate, up = (self._linear(f"{path}.mlp.{name}_proj", normed, adapter) for name in ("gate", "up"))
        inner = ACTIVATIONS[self.layout.config.get("hidden_act", "silu")](gate) * up
        return hidden + self._linear(f"{path}.mlp.down_proj", inner, adapter)

    def _llama_attention(self, layer: int, x: Array, adapter: Adapter, batch: Batch) -> Array:
        path, width = f"model.layers.{layer}.self_attn", self.layout.head_dim
        query, key, value = (
            self._linear(f"{path}.{name}_proj", x, adapter).reshape(len(x), -1, width) for name in "qkv"
        )
        if family_of(self.layout).head_norms:
            query, key = (self._norm(f"{path}.{name}_norm", x, adapter) for name, x in (("q", query), ("k", key)))
        frequencies = inverse_frequencies(self.layout)
        query, key = (rotate(part, batch.positions, frequencies) for part in (query, key))
        attended = attention(query, key, value, batch.row_lengths.tolist(), width**-0.5, self._window(layer))
        return attended.reshape(len(x), -1)

    def _window(self, layer: int) -> int | None:
        config = self.layout.config
        slides = config.get("use_sliding_window", False) and self.layout.layer_types[layer] == "sliding_attention"
        return config.get("sliding_window", 4096) if slides else None

    def _linear(self, path: str, x: Array, adapter: Adapter) -> Array:
        lora_a, lora_b = (adapter.get(f"{path}.lora_{letter}.weight") for letter in "AB")
        scale = self.scales.get(path, self.scale)
        return linear(x, self.base[f"{path}.weight"], self.base.get(f"{path}.bias"), lora_a, lora_b, scale)

    def _norm(self, path: str, x: Array, adapter: Adapter) -> Array:
        weight, bias = (adapter.get(name, self.base.get(name)) for name in (f"{path}.weight", f"{path}.bias"))
        assert weight is not None, "a norm of the family has a weight"
        epsilon = self.layout.norm_eps
        return rms_norm(x, weight, epsilon) if bias is None else layer_norm(x, weight, bias, epsilon)
