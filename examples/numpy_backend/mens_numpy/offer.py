"""What this backend can do, answered without reading a weight."""

from __future__ import annotations

from mens_core import FineTuneContract, KernelOffer, Machine, hookimpl
from mens_core.hf.layout import GRAPHS, Layout

__all__ = ["mens_plan"]


@hookimpl
def mens_plan(contract: FineTuneContract, layout: Layout, machine: Machine) -> KernelOffer:
    """See ``mens_core.hookspecs.mens_plan``; a hook may leave out arguments that it does not need."""
    kernel = f"numpy_{contract.adapter.method}"
    reason = _obstacle_in_contract(contract) or _obstacle_in_model(layout)
    if reason is not None:
        return KernelOffer(kernel=kernel, feasible=False, reason=reason)
    return KernelOffer(
        kernel=kernel,
        feasible=True,
        device="cpu",
        dtype="float32",
        capacity_bytes=machine.memory_bytes,
        patterns=True,
        whole=True,
    )


def _obstacle_in_contract(contract: FineTuneContract) -> str | None:
    device = contract.compute.device
    return _first(
        ("NumPy has no NF4 base; --method lora, or the torch or jax backend", contract.adapter.method != "lora"),
        (f"NumPy computes on the CPU, not on {device}; --device cpu", device not in {"auto", "cpu"}),
        ("NumPy computes in float32; --dtype float32", contract.compute.dtype == "bfloat16"),
    )


def _obstacle_in_model(layout: Layout) -> str | None:
    if layout.family not in GRAPHS:
        return f"NumPy has no graph for model_type {layout.model_type!r}, only for {', '.join(GRAPHS)}"
    if layout.config.get("quantization_config"):
        return "the base is stored quantised already; give the checkpoint it was made from"
    return _obstacle_in_gpt2(layout) if layout.family == "gpt2" else _obstacle_in_llama(layout)


def _obstacle_in_gpt2(layout: Layout) -> str | None:
    plain = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    given = {key: layout.config.get(key, value) for key, value in plain.items()}
    return _first(*((f"{key} = {given[key]!r} is not written here", given[key] != plain[key]) for key in plain))


def _obstacle_in_llama(layout: Layout) -> str | None:
    config, rope = layout.config, layout.rope
    activation, rotated = config.get("hidden_act", "silu"), config.get("partial_rotary_factor", 1.0)
    return _first(
        (f"activation {activation!r} is not silu", activation != "silu"),
        (f"rope_type {rope['rope_type']!r} is not the default one", rope["rope_type"] != "default"),
        ("only whole heads are rotated here", rope.get("partial_rotary_factor", rotated) != 1.0),
        ("a layer attends to a part of the row only", set(layout.layer_types) != {"full_attention"}),
    )


def _first(*obstacles: tuple[str, bool]) -> str | None:
    """The first sentence that holds."""
    return next((sentence for sentence, holds in obstacles if holds), None)
