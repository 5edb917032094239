"""The decoder with its adapter, and the packing of rows into one forward pass.

transformers' own graph runs; eight things are replaced::

    linears of the decoder ─▶ LoraLinear              (of rank 0 where none is targeted; with qlora in NF4)
    attention              ─▶ packed_attention        (by transformers' AttentionInterface, see _packing)
    head and loss          ─▶ loss.supervised_loss    (on the hidden states of supervised positions)
    what is trained whole  ─▶ a master in float32     (embeddings, norms, the head, see _whole)
    GELU in eight steps    ─▶ the same GELU in one    (GPT-2's, see _activations)
    RMS norms              ─▶ one node each           (those that give its very bits, see _rms_norm)
    gated layers           ─▶ a gate in one node      (the same, see _gated)
    rotary positions       ─▶ one node a layer        (the same, see _rotary)

Nothing is taken on trust: ``load_model`` runs a few tokens and keeps what it found. A model whose rows do not
come out of a packed batch as they do alone, by its own attention, runs its rows one at a time (``packed``); a
model whose logits are not exactly head(hidden) computes its own logits (``linear_head``).
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, cast

import attrs
import torch
from torch import Tensor as Array
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from mens_core.exchange import NF4Spec
from mens_core.hf.fit import HEAD
from mens_core.plan import ExecutionPlan
from mens_torch._activations import GELU
from mens_torch._checkpointing import checkpoint_layers
from mens_torch._gated import fuse_gates
from mens_torch._packing import PACKED, PROVING, RefusedError, register
from mens_torch._pages import MappedFiles
from mens_torch._products import linear
from mens_torch._remade import remember_outputs
from mens_torch._rms_norm import fuse_rms_norms
from mens_torch._rotary import fuse_rotations
from mens_torch._siblings import joined
from mens_torch._whole import train_whole
from mens_torch.dropout import Dropout
from mens_torch.lora import LoraLinear, select_targets
from mens_torch.quant import quantize
from mens_torch.weights import load_base

__all__ = ["Model", "hidden_states", "load_model", "logits", "set_dropout"]

# Relative distances (Frobenius) of a row's hidden states. With other neighbours nothing may change but rounding, and
# that only where experts see groups of another size (4e-7 and 0 were seen); against the model's own attention the
# order of summation counts (1.6e-7 and 6e-3). A false alarm costs speed, not correctness.
_SAME = {torch.float32: 5e-6, torch.bfloat16: 5e-3}
_ALIKE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# First token and length of the rows a model is tried on: three rows, then another first and another last one.
_PROBE = ((1, 5), (11, 4), (21, 6), (31, 5), (41, 6))

_log = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class Model:
    """The frozen base with its adapter on its device.

    Attributes:
        network: transformers' model; with its own attention unless ``packed``.
        decoder: the part that ends in hidden states.
        head: (V, D), the output projection; its float32 master where it is trained.
        adapters: module path → the layer that holds its A and B.
        whole: name of a tensor of the base → its float32 master, of modules that are trained whole.
        device: where it all lives.
        own_attention: the attention transformers chose for it; decoding uses it.
        packed: whether rows run packed; else one at a time.
        linear_head: whether logits are hidden · headᵀ; else the network computes them.
    """

    network: Any
    decoder: Any
    head: Array | None
    adapters: dict[str, LoraLinear]
    whole: dict[str, Array]
    device: str
    own_attention: str
    packed: bool = False
    linear_head: bool = False


def load_model(plan: ExecutionPlan) -> Model:
    """Load the base, put the adapter in, and find out how the model may be run.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite, or its layers cannot be computed
            again as ``gradient_checkpointing`` asks for.
        ContractError: if a target names no linear layer.
    """
    network = load_base(plan)
    adapters = _adapt(network, plan)
    _convert(network, plan)
    for path, module in list(network.named_modules()):
        if type(module) is NewGELUActivation:
            network.set_submodule(path, GELU())
    if plan.contract.training.gradient_checkpointing:
        checkpoint_layers(network)
    whole = train_whole(network, plan)
    dtype = getattr(torch, plan.dtype)
    fuse_gates(network, dtype)
    fuse_rms_norms(network, dtype)
    fuse_rotations(network, dtype)
    remember_outputs(network, dtype)
    head = network.get_output_embeddings()
    model = Model(
        network=network,
        decoder=network.base_model,
        head=whole.get(HEAD, head.weight) if isinstance(head, nn.Linear) and head.bias is None else None,
        adapters=adapters,
        whole=whole,
        device=plan.device,
        own_attention=network.config._attn_implementation,  # noqa: SLF001 (it has no public reader)
    )
    _prove(model, plan)
    return model


def set_dropout(model: Model, dropout: Dropout | None) -> None:
    """Let every adapter drop entries of its input, each by a mask of its own; None ends it.

    Args:
        model: from ``load_model``.
        dropout: of one batch of one step.
    """
    for path, layer in model.adapters.items():
        layer.dropout = None if dropout is None else dropout.fold(path)


def hidden_states(model: Model, input_ids: Array, positions: Array, rows: tuple[int, ...]) -> Array:
    """Hidden states after the decoder's last norm, what the head reads.

    Args:
        model: from ``load_model``.
        input_ids: (T,) int64.
        positions: (T,) int64, restarting with each row.
        rows: length of each row, summing to T.

    Returns:
        (T, D) in the base's format.
    """
    return _run(model, model.decoder, input_ids, positions, rows)


def logits(model: Model, input_ids: Array, positions: Array, rows: tuple[int, ...], keep: Array) -> Array:
    """Logits of chosen positions; without a gradient where they are hidden · headᵀ.

    Args:
        model: from ``load_model``.
        input_ids: (T,) int64.
        positions: (T,) int64, restarting with each row.
        rows: length of each row, summing to T.
        keep: (K,) int64, indices into the T positions.

    Returns:
        (K, V), in the base's format or in float32, as the model gives them.
    """
    if model.linear_head and model.head is not None:
        hidden = hidden_states(model, input_ids, positions, rows)
        return linear(hidden.index_select(0, keep), model.head.to(hidden.dtype))
    return _run(model, model.network, input_ids, positions, rows).index_select(0, keep)


def _run(model: Model, part: Any, input_ids: Array, positions: Array, rows: tuple[int, ...]) -> Array:
    """The first output of the decoder or of the whole network, (T, D) or (T, V)."""
    if model.packed:
        output = part(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, rows=rows)[0]
        return cast("Array", output.squeeze(0))
    alone = [part(input_ids=row[None], use_cache=False)[0] for row in torch.split(input_ids, list(rows))]
    return torch.cat(alone, dim=1).squeeze(0)


def _adapt(network: Any, plan: ExecutionPlan) -> dict[str, LoraLinear]:
    """Replace every linear of the decoder, with an adapter or without one; returns those with one."""
    adapter, quant = plan.contract.adapter, plan.contract.quant
    spec = NF4Spec(block_size=quant.block_size, double_quant=quant.double_quant)
    head, inside = network.get_output_embeddings(), set(network.base_model.modules())
    linears = {
        path: module
        for path, module in network.named_modules()
        if module in inside and module is not head and _is_product(module)
    }
    chosen = set(select_targets(tuple(linears), adapter.targets))
    layers: dict[str, LoraLinear] = {}
    files = MappedFiles(plan.model_dir)
    for path, module in linears.items():
        weight = module.weight.detach().to(plan.device)
        weight = weight.t() if isinstance(module, Conv1D) else weight
        dtype = getattr(torch, plan.dtype) if adapter.method == "qlora" else weight.dtype
        bias = None if module.bias is None else module.bias.detach().to(plan.device, dtype)
        frozen = quantize(weight, spec) if adapter.method == "qlora" else weight
        rank = adapter.rank_of(path) if path in chosen else 0
        layers[path] = LoraLinear(frozen, bias, rank, adapter.scale_of(path))
        network.set_submodule(path, layers[path])
        if adapter.method == "qlora":
            files.was_read(weight.nbytes)
    return {path: layer for path, layer in layers.items() if path in chosen}


def _convert(network: Any, plan: ExecutionPlan) -> None:
    """Bring what was not replaced into the plan's number format, and all of it to the device."""
    exempt = tuple(network._keep_in_fp32_modules_strict or ())  # noqa: SLF001 (transformers' own list)
    for name, parameter in network.named_parameters():
        if not name.endswith((".lora_a", ".lora_b")) and not any(part in name for part in exempt):
            parameter.data = parameter.data.to(getattr(torch, plan.dtype))
    network.to(plan.device)


def _is_product(module: Any) -> bool:
    """Whether a module computes x Wᵀ + b and nothing else; a subclass of Linear is believed only after a try."""
    if type(module) in {nn.Linear, Conv1D}:
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    with torch.no_grad():
        found, product = module(x), functional.linear(x, module.weight, module.bias)
    return isinstance(found, Array) and found.shape == product.shape and torch.allclose(found, product, rtol=1e-2)


def _prove(model: Model, plan: ExecutionPlan) -> None:
    """Set ``packed`` and ``linear_head`` from what a few tokens show."""
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    first, middle, last, other_first, other_last = (
        (torch.arange(start, start + length) * 7919 % vocabulary).to(model.device) for start, length in _PROBE
    )
    with torch.no_grad():
        with joined(module for module in model.network.modules() if isinstance(module, LoraLinear)):
            output = model.decoder(input_ids=middle[None], use_cache=False)
        alone = output[0]
        if model.decoder is not model.network and model.head is not None:
            own = _logits_after(model, middle, output)
            # Exact, because a capped or scaled logit may differ by less than any tolerance on these tokens.
            product = functional.linear(alone, model.head.to(alone.dtype))
            model.linear_head = torch.equal(product.float(), own.float())
        obstacle = _obstacle(model, plan)
        if obstacle is None:
            obstacle = _try_packing(model, alone[0], [(first, middle, last), (other_first, middle, other_last)])
    model.packed = obstacle is None
    if obstacle is not None:
        _log.warning("rows run one at a time: %s", obstacle)


def _logits_after(model: Model, row: Array, output: Any) -> Array:
    """The network's own logits of one row, (1, L, V).

    The decoder's output is known: it gives it again if it is asked for nothing but this row, since to compute it once
    more may take as long as reading gigabytes of weights.
    """
    decoder, ids = model.decoder, row[None]
    forward, own = decoder.forward, vars(decoder).get("forward")

    def known(*args: Any, **given: Any) -> Any:
        asked = [*args, *(value for name, value in given.items() if name != "return_dict" and value is not None)]
        more = [value for value in asked if value is not ids and value is not False]
        return forward(*args, **given) if more else output

    decoder.forward = known
    try:
        found: Array = model.network(input_ids=ids, use_cache=False).logits
        return found
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def _obstacle(model: Model, plan: ExecutionPlan) -> str | None:
    """What rules packing out before it is tried."""
    network, accepted = model.network, inspect.signature(model.decoder.forward).parameters
    keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if not network._supports_attention_backend or "position_ids" not in accepted or not keywords:  # noqa: SLF001
        return f"{type(network).__name__} does not go through transformers' attention interface"
    rope, config = plan.layout.rope, plan.layout.config
    if rope["rope_type"] in {"dynamic", "longrope"}:
        # These frequencies depend on the longest row of the batch, once it is longer than this.
        own = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        limit = own if own and rope["rope_type"] == "longrope" else plan.layout.max_positions
        if plan.contract.data.seq_len > limit:
            return f"its {rope['rope_type']} rotary embedding changes with the longest row"
    return None


def _try_packing(model: Model, alone: Array, batches: list[tuple[Array, ...]]) -> str | None:
    """Run two batches that share their middle row; say what is wrong, None if nothing is.

    Args:
        model: left with packed attention, or with its own if something is wrong.
        alone: (L, D), the middle row's hidden states by the model's own attention.
        batches: rows of two batches.
    """
    register()
    found, obstacle = [], None
    model.network.set_attn_implementation(PROVING)
    model.packed = True
    try:
        for batch in batches:
            rows = tuple(len(row) for row in batch)
            positions = torch.cat([torch.arange(length, device=model.device) for length in rows])
            hidden = hidden_states(model, torch.cat(batch), positions, rows)
            found.append(hidden[rows[0] : rows[0] + rows[1]])
    except RefusedError as error:
        obstacle = str(error)
    else:
        if _distance(found[0], found[1]) > _SAME[alone.dtype]:
            obstacle = "a row changes with the other rows of its batch"
        elif _distance(found[0], alone) > _ALIKE[alone.dtype]:
            obstacle = "a packed row differs from the same row alone"
    model.network.set_attn_implementation(PACKED if obstacle is None else model.own_attention)
    return obstacle


def _distance(left: Array, right: Array) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())
