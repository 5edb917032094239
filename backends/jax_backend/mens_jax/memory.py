"""How much memory a run takes, part by part, from the model's numbers and its largest batch; needs no JAX.

Batches are filled up to one of a few sizes (``_sizes``), so the largest of these decides. The scan over the layers
keeps what goes into each layer and, where there is room and gradient checkpointing does not forbid it, every product
(``_blocks.scan_blocks``); the rest of a layer is computed again. Against XLA's own account of the compiled step
(``memory_analysis``) this is right to a few per cent in models of 30 to 130 million parameters.

On a CPU the demand is that of the whole process, the compiler's included. XLA there has no products in bfloat16: it
computes them in float32 and holds a float32 copy of the weights while it does.
"""

from __future__ import annotations

from mens_core.contract import FineTuneContract
from mens_core.costs import adapted_linears, rows_memory, standing_memory, states_memory, whole_parameters
from mens_core.hf.fit import HEAD
from mens_core.hf.layout import Layout
from mens_core.plan import BaseWeights, Workload
from mens_jax._names import stacks_of
from mens_jax._sizes import Buckets, has_room, logits_chunk

__all__ = ["memory_parts"]

_MIB = 1 << 20
# Of a process that has loaded JAX 0.10, flax and optax and opened a model.
_OPENED = 290 * _MIB
# What compiling the step adds, and each block of queries that attention is compiled for; measured on one core.
_COMPILED, _COMPILED_A_BLOCK = 230 * _MIB, 35 * _MIB
# What compiling NF4's way back adds, and numba 0.68, which compiles its way there.
_COMPILED_NF4 = 120 * _MIB
# Of the widest input that is dropped: what is multiplied with its mask, both ways. Nothing of it is kept.
_MASKED = 2
# A CUDA context with cuBLAS' workspace, as NVIDIA's tools commonly show it; not measured here.
_CUDA_FRAMEWORK = 600 * _MIB


def memory_parts(
    contract: FineTuneContract, layout: Layout, weights: BaseWeights, workload: Workload, device: str, dtype: str
) -> dict[str, int]:
    """Bytes by part, out of ``plan.MEMORY_PARTS``; the sum is the highest demand on the device.

    Args:
        contract: what is asked for.
        layout: of the base.
        weights: of the base.
        workload: its largest batch decides.
        device: ``cpu``, where the whole process counts, or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.
    """
    on_cpu, size = device == "cpu", Buckets(workload.shape).tiers[-1]
    width = 4 if on_cpu else _width(dtype)
    held = standing_memory(layout, weights, contract, dtype)
    whole = whole_parameters(layout, contract.adapter)
    filled = 4 * (_filled_up(contract, layout, weights) + sum(whole.values()))
    held |= {"adapter": filled, "optimizer": 2 * filled}
    # The sum over the window and the batch's own.
    held["gradients"] = 2 * filled
    linear = sum(out * into for out, into in weights.linears.values())
    # The softmax's powers and slopes are in float32, and both are there before the second product.
    logits = 2 * 4 * layout.vocab_size * min(size.supervised, logits_chunk(layout.vocab_size))
    # A chunk's product, and the head in the run's format where that is another than the master's.
    logits += (4 if dtype == "float32" else 4 + _width(dtype)) * whole.get(HEAD, 0)
    # What the backward pass of one layer makes; the logits are gone by then.
    layer = width * linear // layout.num_layers + 3 * width * size.tokens * layout.intermediate_size
    if contract.adapter.dropout:
        layer += _MASKED * width * size.tokens * layout.intermediate_size
    blocks = held.get("quantised_base", _width(dtype) * linear)
    again = contract.training.gradient_checkpointing or not _room(weights, size.tokens, blocks, dtype)
    activations = width * _kept(layout, weights, size.tokens, again=again) + max(0, layer - logits)
    if on_cpu and dtype == "bfloat16":
        dense = linear if contract.adapter.method == "lora" else 0
        activations += 4 * (dense + layout.vocab_size * layout.hidden_size)
    parts = {
        "framework": _framework(contract, size.longest) if on_cpu else _CUDA_FRAMEWORK,
        **held,
        "activations": activations,
        "logits": logits,
    }
    loading = _loading(weights, parts) if on_cpu else 0
    host = {"rows": rows_memory(workload), "states": states_memory(layout, contract.adapter)} if on_cpu else {}
    return parts | {"loading": loading, "rows": 0, **host}


def _room(weights: BaseWeights, tokens: int, blocks: int, dtype: str) -> bool:
    """Whether ``_blocks.scan_blocks`` has room for the products of all layers.

    Args:
        weights: of the base.
        tokens: of the batch, filled up.
        blocks: bytes of the decoder's blocks.
        dtype: of the plan.
    """
    return has_room(tokens * sum(out for out, _ in weights.linears.values()) * _width(dtype), blocks)


def _kept(layout: Layout, weights: BaseWeights, tokens: int, *, again: bool) -> int:
    """Numbers that wait for the backward pass: what goes into each layer, and its products.

    Args:
        layout: of the base.
        weights: of the base.
        tokens: of the batch, filled up.
        again: whether the products are computed again, so that only one layer's are there at a time.
    """
    products = sum(out for out, _ in weights.linears.values()) + layout.num_layers * layout.num_heads * layout.head_dim
    if again:
        products //= layout.num_layers
    return tokens * (layout.num_layers * layout.hidden_size + products)


def _filled_up(contract: FineTuneContract, layout: Layout, weights: BaseWeights) -> int:
    """Numbers in A and B of all stacks: every layer of a stack takes what the one of the largest rank does."""
    adapter, adapted = contract.adapter, adapted_linears(weights, contract.adapter)
    numbers = 0
    for paths in stacks_of(adapted).values():
        rank, shape = max(map(adapter.rank_of, paths.values())), adapted[next(iter(paths.values()))]
        numbers += layout.num_layers * rank * sum(shape)
    return numbers


def _framework(contract: FineTuneContract, longest: int) -> int:
    blocks = -(-longest // max(64, -(-longest // 4)))
    compiled = _COMPILED + blocks * _COMPILED_A_BLOCK
    return _OPENED + compiled + (_COMPILED_NF4 if contract.adapter.method == "qlora" else 0)


def _loading(weights: BaseWeights, parts: dict[str, int]) -> int:
    """What loading needs beyond what training then holds: the mapped files stand beside the arrays made from them."""
    loads = _OPENED + weights.stored_bytes + parts["base"] + parts.get("quantised_base", 0)
    return max(0, loads - sum(parts.values()))


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
