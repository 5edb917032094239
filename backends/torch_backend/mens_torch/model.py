"""The decoder with its adapter, and the packing of rows into one forward pass.

transformers' own graph runs; three things are replaced::

    linears of the decoder ─▶ LoraLinear              (every targeted one; with qlora all, in NF4)
    attention              ─▶ packed_attention        (registered with transformers' AttentionInterface)
    head and loss          ─▶ loss.supervised_loss    (on the hidden states of supervised positions)

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
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from mens_core.exchange import ExecutionPlan, NF4Spec
from mens_torch.attention import packed_attention
from mens_torch.lora import LoraLinear, select_targets
from mens_torch.quant import quantize
from mens_torch.weights import load_base

__all__ = ["Model", "hidden_states", "load_model", "logits"]

# Two names for one attention. Under the first transformers builds masks, which tell a window or an extra mask;
# under the second it builds none, and does not wait for the device to look for packed rows.
_PROVING, _PACKED = "mens_packed_proving", "mens_packed"
# What attention is told that does not change its result, or that is read by name.
_UNDERSTOOD = {"position_ids", "position_embeddings", "cache_position", "is_causal", "scaling"} | {
    "rows",
    "sliding_window",
    "softcap",
    "s_aux",
}
# Relative distance (Frobenius) of hidden states. Other rows may change rounding only (experts see other group
# sizes); another attention kernel adds its own. A leak or an ignored argument moves them by far more, and a
# false alarm costs speed, not correctness.
_SAME = {torch.float32: 1e-6, torch.bfloat16: 3e-2}
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
        head: (V, D), the output projection.
        adapters: module path → the layer that holds its A and B.
        device: where it all lives.
        own_attention: the attention transformers chose for it; decoding uses it.
        packed: whether rows run packed; else one at a time.
        linear_head: whether logits are hidden · headᵀ; else the network computes them.
    """

    network: Any
    decoder: Any
    head: Array | None
    adapters: dict[str, LoraLinear]
    device: str
    own_attention: str
    packed: bool = False
    linear_head: bool = False


def load_model(plan: ExecutionPlan) -> Model:
    """Load the base, put the adapter in, and find out how the model may be run.

    Raises:
        ModelError: if weights are missing, left over, wrongly shaped or not finite.
        ContractError: if a target names no linear layer.
    """
    network = load_base(plan)
    adapters = _adapt(network, plan)
    _convert(network, plan)
    head = network.get_output_embeddings()
    model = Model(
        network=network,
        decoder=network.base_model,
        head=head.weight if isinstance(head, nn.Linear) and head.bias is None else None,
        adapters=adapters,
        device=plan.device,
        own_attention=network.config._attn_implementation,  # noqa: SLF001 (it has no public reader)
    )
    _prove(model, plan)
    return model


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
    """Logits of chosen positions.

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
        return functional.linear(hidden_states(model, input_ids, positions, rows)[keep], model.head)
    return _run(model, model.network, input_ids, positions, rows)[keep]


def _run(model: Model, part: Any, input_ids: Array, positions: Array, rows: tuple[int, ...]) -> Array:
    """The first output of the decoder or of the whole network, (T, D) or (T, V)."""
    if model.packed:
        output = part(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, rows=rows)[0][0]
        return cast("Array", output)
    return torch.cat([part(input_ids=row[None], use_cache=False)[0][0] for row in torch.split(input_ids, rows)])


def _adapt(network: Any, plan: ExecutionPlan) -> dict[str, LoraLinear]:
    """Replace linears of the decoder: the targeted ones, and for qlora every one."""
    adapter, quant = plan.contract.adapter, plan.contract.quant
    spec = NF4Spec(block_size=quant.block_size, double_quant=quant.double_quant)
    head, inside = network.get_output_embeddings(), set(network.base_model.modules())
    linears = {
        path: module
        for path, module in network.named_modules()
        # A subclass may compute something else than a product, so only these two.
        if type(module) in {nn.Linear, Conv1D} and module in inside and module is not head
    }
    chosen = set(select_targets(tuple(linears), adapter.targets))
    layers: dict[str, LoraLinear] = {}
    for path, module in linears.items():
        if path not in chosen and adapter.method == "lora":
            continue
        weight = module.weight.detach().to(plan.device)
        weight = weight.t() if isinstance(module, Conv1D) else weight
        bias = None if module.bias is None else module.bias.detach().to(plan.device, getattr(torch, plan.dtype))
        frozen = quantize(weight, spec) if adapter.method == "qlora" else weight
        layers[path] = LoraLinear(frozen, bias, adapter.rank if path in chosen else 0, adapter.scale)
        network.set_submodule(path, layers[path])
    return {path: layer for path, layer in layers.items() if path in chosen}


def _convert(network: Any, plan: ExecutionPlan) -> None:
    """Bring what was not replaced into the plan's number format, and all of it to the device."""
    exempt = tuple(network._keep_in_fp32_modules_strict or ())  # noqa: SLF001 (transformers' own list)
    for name, parameter in network.named_parameters():
        if not name.endswith((".lora_a", ".lora_b")) and not any(part in name for part in exempt):
            parameter.data = parameter.data.to(getattr(torch, plan.dtype))
    network.to(plan.device)


class _RefusedError(Exception):
    """The model asks for something that packed attention does not do."""


def _prove(model: Model, plan: ExecutionPlan) -> None:
    """Set ``packed`` and ``linear_head`` from what a few tokens show."""
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    # Three rows, then the same batch with another first and last row.
    tokens = [torch.arange(first, first + length) * 7919 % vocabulary for first, length in _PROBE]
    first, middle, last, other_first, other_last = (row.to(model.device) for row in tokens)
    caught: list[Array] = []
    hook = model.decoder.register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
    with torch.no_grad():
        try:
            own = model.network(input_ids=middle[None], use_cache=False).logits
        finally:
            hook.remove()
        if model.decoder is not model.network and model.head is not None:
            # Exact, because a capped or scaled logit may differ by less than any tolerance on these tokens.
            model.linear_head = torch.equal(functional.linear(caught[0], model.head).float(), own.float())
        reason = _obstacle(model, plan)
        if reason is None:
            reason = _proof_of_packing(model, caught[0][0], (first, middle, last), (other_first, middle, other_last))
    model.packed = reason is None
    if reason is not None:
        _log.warning("rows run one at a time: %s", reason)


def _obstacle(model: Model, plan: ExecutionPlan) -> str | None:
    """What rules packing out before it is tried."""
    network, accepted = model.network, inspect.signature(model.decoder.forward).parameters
    keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if not network._supports_attention_backend or "position_ids" not in accepted or not keywords:  # noqa: SLF001
        return f"{type(network).__name__} does not go through transformers' attention interface"
    # These rotary frequencies depend on the longest row of the batch, once it is longer than this.
    rope = plan.layout.rope
    limit = rope.get("original_max_position_embeddings") or plan.layout.config.get("original_max_position_embeddings")
    limit = limit if rope["rope_type"] == "longrope" and limit else plan.layout.max_positions
    if rope["rope_type"] in {"dynamic", "longrope"} and plan.contract.data.seq_len > limit:
        return f"its {rope['rope_type']} rotary embedding changes with the longest row"
    return None


def _proof_of_packing(model: Model, alone: Array, *batches: tuple[Array, ...]) -> str | None:
    """Run two batches that share their middle row; say what is wrong, None if nothing is."""
    found = []
    AttentionInterface.register(_PROVING, _checked_attention)
    AttentionMaskInterface.register(_PROVING, _window_only)
    AttentionInterface.register(_PACKED, _attention)
    reason = None
    model.network.set_attn_implementation(_PROVING)
    model.packed = True
    try:
        for batch in batches:
            rows = tuple(len(row) for row in batch)
            positions = torch.cat([torch.arange(length, device=model.device) for length in rows])
            hidden = hidden_states(model, torch.cat(batch), positions, rows)
            found.append(hidden[rows[0] : rows[0] + rows[1]])
    except _RefusedError as error:
        reason = str(error)
    else:
        if _distance(found[0], found[1]) > _SAME[alone.dtype]:
            reason = "a row changes with the other rows of its batch"
        elif _distance(found[0], alone) > _ALIKE[alone.dtype]:
            reason = "a packed row differs from the same row alone"
    model.network.set_attn_implementation(_PACKED if reason is None else model.own_attention)
    return reason


def _distance(left: Array, right: Array) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())


def _checked_attention(module: Any, query: Array, key: Array, value: Array, mask: Array | None, **given: Any) -> Any:
    """``_attention``, refusing every argument that it would ignore."""
    name = type(module).__name__
    if given.get("rows") is None:
        raise _RefusedError(f"{name} is not told where rows end")
    unknown = [key for key, value in given.items() if key not in _UNDERSTOOD and not _idle(value)]
    if unknown or not given.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise _RefusedError(f"{name} asks for another attention: {', '.join(unknown) or 'one that is not causal'}")
    if (None if mask is None else int(mask)) != given.get("sliding_window"):
        raise _RefusedError(f"{name} masks more than a sliding window")
    return _attention(module, query, key, value, None, **given)


def _idle(value: object) -> bool:
    return value is None or (isinstance(value, bool | int | float) and not value)


def _window_only(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Array | None:
    """Stands in for a mask while proving: the window's width as one number, None for plain causality."""
    if use_vmap:
        raise _RefusedError("the model adds a mask of its own")
    return None if local_size is None else torch.tensor(local_size)


def _attention(module: Any, query: Array, key: Array, value: Array, mask: Array | None, **given: Any) -> Any:
    """Packed attention as transformers calls it: (1, heads, T, E) in, (1, T, heads, E) out."""
    del module, mask
    scale = given.get("scaling") or query.shape[-1] ** -0.5
    rows, window, softcap, sinks = (given.get(name) for name in ("rows", "sliding_window", "softcap", "s_aux"))
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    if softcap is None and sinks is None:
        return packed_attention(query, key, value, rows, scale, window)[None], None
    split = zip(*(torch.split(part, rows) for part in (query, key, value)), strict=True)
    outputs = [_spelled_out(*row, scale=scale, window=window, softcap=softcap, sinks=sinks) for row in split]
    return torch.cat(outputs)[None], None


def _spelled_out(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
) -> Array:
    """One row's attention by the formula, for scores that are capped (Gemma 2) or share with a sink (gpt-oss)."""
    group, length = query.shape[1] // key.shape[1], query.shape[0]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhe,khe->hqk", query, key).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    seen = seen if window is None else seen.triu(1 - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, length, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length].to(value.dtype)
    return torch.einsum("hqk,khe->qhe", weights, value)
