"""The decoder with its adapter: one graph for GPT-2, Llama, Qwen2 and Qwen3, decided by the layout.

::

    input_ids ─▶ embedding ─▶ scan over the stacked blocks ─▶ last norm ─▶ head, on chosen positions
                                    │
                     every linear a LoraLinear, attention packed_attention

The state of ``Model`` is named as the checkpoint: ``model.layers.self_attn.q_proj.weight`` holds that weight of
every layer, the layers in front; ``lora_a`` and ``lora_b`` lie beside it, and ``master`` beside what is
trained whole (``_whole``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mens_core.hf.fit import HEAD
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.whole import whole_shapes
from mens_core.plan import ExecutionPlan
from mens_core.sections import AdapterSpec
from mens_jax._arrays import dot
from mens_jax._blocks import Gpt2Decoder, LlamaDecoder, scan_blocks
from mens_jax._names import stacks_of
from mens_jax._packing import Rows
from mens_jax._parts import Embedding, Parts
from mens_jax._whole import Dense
from mens_jax.attention import packed_attention
from mens_jax.dropout import Dropout
from mens_jax.lora import LoraLinear, select_targets
from mens_jax.weights import load_base

__all__ = ["Model", "hidden_states", "load_model", "logits", "set_dropout"]


class Model(nnx.Module):
    """The frozen base with its adapter.

    Args:
        decoder: the part that ends in hidden states.
        lm_head: the output projection; None where the embedding is.
        adapted: module paths that carry an adapter, layer by layer. Where they name only some layers of a stack,
            the others carry A = B = 0, which no update ever moves.
        checkpointed: whether of each layer only its input is kept for the backward pass.
    """

    def __init__(
        self,
        decoder: Gpt2Decoder | LlamaDecoder,
        lm_head: Embedding | None,
        adapted: tuple[str, ...],
        *,
        checkpointed: bool,
    ) -> None:
        self.stem = "transformer" if isinstance(decoder, Gpt2Decoder) else "model"
        setattr(self, self.stem, decoder)
        self.lm_head, self.adapted, self.checkpointed = lm_head, adapted, checkpointed
        self.dropout: Dropout | None = nnx.data(None)

    @property
    def decoder(self) -> Gpt2Decoder | LlamaDecoder:
        """The part that ends in hidden states."""
        return cast("Gpt2Decoder | LlamaDecoder", getattr(self, self.stem))

    @property
    def table_out(self) -> Dense:
        """(V, D), the output projection; the embedding where the two are tied."""
        return (self.lm_head or self.decoder.table).weight

    @property
    def head(self) -> Array:
        """The same in the base's format."""
        return self.table_out()


def load_model(plan: ExecutionPlan) -> Model:
    """Load the base and put the adapter in.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite.
        ContractError: if a target names no linear layer.
    """
    adapter = plan.contract.adapter
    adapted = select_targets(tuple(linear_shapes(plan.layout)), adapter.targets)
    stacks = stacks_of(adapted)
    parts = Parts(
        layout=plan.layout,
        base=load_base(plan),
        ranks={stack: max(map(adapter.rank_of, paths.values())) for stack, paths in stacks.items()},
        scales={stack: _scale(adapter, paths, plan.layout.num_layers) for stack, paths in stacks.items()},
        whole=stacks_of(whole_shapes(plan.layout, adapter.modules_to_save)),
    )
    gpt2 = plan.layout.family == "gpt2"
    decoder = Gpt2Decoder(parts, "transformer") if gpt2 else LlamaDecoder(parts, "model")
    lm_head = parts.embedding("lm_head") if HEAD in parts.base else None
    return Model(decoder, lm_head, adapted, checkpointed=plan.contract.training.gradient_checkpointing)


def set_dropout(model: Model, dropout: Dropout | None) -> None:
    """Let every adapter drop entries of its input, each by a mask of its own; None ends it.

    Args:
        model: from ``load_model``, inside the function that is being compiled.
        dropout: of one batch of one step.
    """
    model.dropout = dropout


def hidden_states(model: Model, input_ids: Array, positions: Array, rows: Rows) -> Array:
    """Hidden states after the decoder's last norm, what the head reads.

    Args:
        model: from ``load_model``.
        input_ids: (T,) int32.
        positions: (T,) int32, restarting with each row.
        rows: where each row lies; what lies beyond the rows gives hidden states of no meaning.

    Returns:
        (T, D) in the base's format.
    """

    def attend(query: Array, key: Array, value: Array, scale: float, window: Array | None) -> Array:
        return packed_attention(query, key, value, rows, scale, window)

    def run(block: Callable[..., Array], hidden: Array, layer: Array | None) -> tuple[Array, None]:
        if model.dropout is not None and layer is not None:
            _drop_in(block, model.dropout.fold(layer))
        return block(hidden, rotary, attend), None

    blocks = model.decoder.blocks
    # Without dropout there is nothing to count, and the compiled function is the plain one.
    layers = None if model.dropout is None else jnp.arange(len(jax.tree.leaves(nnx.state(blocks))[0]))
    hidden, rotary = model.decoder.embed(input_ids, positions)
    hidden, _ = scan_blocks(blocks, hidden, run, layers, checkpointed=model.checkpointed)
    return model.decoder.norm_out(hidden)


def logits(model: Model, input_ids: Array, positions: Array, rows: Rows, keep: Array) -> Array:
    """Logits of chosen positions.

    Args:
        model: from ``load_model``.
        input_ids: (T,) int32.
        positions: (T,) int32, restarting with each row.
        rows: where each row lies.
        keep: (K,) int32, indices into the T positions.

    Returns:
        (K, V) float32.
    """
    return dot(hidden_states(model, input_ids, positions, rows)[keep], model.head.T, jnp.float32)


def _scale(adapter: AdapterSpec, paths: Mapping[int, str], layers: int) -> float | Array:
    """Of the layers of a stack: one number where all that are adapted have the same, else one each, (layers,)."""
    scales = {layer: adapter.scale_of(path) for layer, path in paths.items()}
    first = next(iter(scales.values()))
    if all(scale == first for scale in scales.values()):
        return first
    return jnp.asarray([scales.get(layer, 0.0) for layer in range(layers)], jnp.float32)


def _drop_in(block: Any, dropout: Dropout) -> None:
    """Give every linear of one layer, whose dropout this is, a mask of its own."""
    linears = [(path, module) for path, module in nnx.iter_graph(block) if isinstance(module, LoraLinear)]
    for path, linear in linears:
        linear.dropout = dropout.fold(".".join(map(str, path)))
