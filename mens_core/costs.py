"""What an optimizer step costs, counted from the model's numbers and the rows; no tensor library is asked.

    layout · linears · contract · workload ──▶ counts of work ──·── seconds per unit ──▶ seconds a step

Counts are of work, not of time: a kernel's ``Speed`` says how long a unit of each takes on this machine. Products
count two FLOPs for a multiplication and an addition. A frozen linear has two products, x Wᵀ and dy W, where a trained
one has three (Kaplan et al. 2020, section 2.1, counts 2 and 4 FLOPs a weight and token); an adapter has six thin
ones (Hu et al. 2021, section 4.1); attention has two forward and five backward (Dao 2023, FlashAttention-2,
section 3.1.2). With gradient checkpointing the layers run forward once more. Letters: T tokens, S supervised tokens,
V vocabulary, D width, F feed-forward width, H query and K key/value heads of width E, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mens_core.contract import FineTuneContract
from mens_core.exchange import NF4Spec
from mens_core.hf.fit import HEAD
from mens_core.hf.layout import Layout
from mens_core.hf.whole import TABLES, whole_shapes
from mens_core.plan import BaseWeights, Speed, Workload
from mens_core.sections import AdapterSpec

__all__ = [
    "COSTS",
    "adapted_linears",
    "adapter_parameters",
    "nf4_bytes",
    "rows_memory",
    "standing_memory",
    "states_memory",
    "step_costs",
    "step_seconds",
    "whole_parameters",
]

# Four of an id and one of its mask; eight of where a row begins, eight of a count, four of its source, all of it mapped
# from disk, and four of its place in an epoch's order.
_BYTES_A_TOKEN, _BYTES_A_ROW = 5, 24

COSTS = (
    "products",
    "adapter",
    "attention",
    "elementwise",
    "logits",
    "weights",
    "layers",
    "updates",
)
"""Kinds of work. FLOPs: ``products`` with the frozen linears and the head, ``adapter`` with A and B, ``attention``.
Numbers: ``elementwise`` what norms, activations and rotary embeddings read and write, ``logits`` that go through the
softmax, ``weights`` brought to the multiplier, which for NF4 is dequantisation, ``updates`` of the optimizer.
Calls: ``layers`` that are run forward and backward, however few tokens they see."""


def adapted_linears(weights: BaseWeights, adapter: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Module path → (out, in) of the linears that carry an adapter.

    A target names a linear as ``mens_<backend>.lora.select_targets`` reads it; names that fit nothing add nothing.
    """
    if adapter.targets == ("all-linear",):
        return dict(weights.linears)
    endings = tuple(f".{name}" for name in adapter.targets)
    return {path: shape for path, shape in weights.linears.items() if f".{path}".endswith(endings)}


def adapter_parameters(weights: BaseWeights, adapter: AdapterSpec) -> int:
    """Numbers in all A (R, in) and B (out, R), each of its layer's rank."""
    return sum(adapter.rank_of(path) * sum(shape) for path, shape in adapted_linears(weights, adapter).items())


def whole_parameters(layout: Layout, adapter: AdapterSpec) -> dict[str, int]:
    """Name → numbers of the tensors that are trained whole."""
    return {name: math.prod(shape) for name, shape in whole_shapes(layout, adapter.modules_to_save).items()}


def nf4_bytes(numbers: int, spec: NF4Spec) -> int:
    """Bytes of one weight in NF4: codes, scales, and with double quantization the scales' scales and their mean.

    Of 64-number blocks that is 4.5 bits a number, with double quantization 4.127 (Dettmers et al. 2023, section 3).
    """
    blocks = -(-numbers // spec.block_size)
    scales = blocks + 4 * -(-blocks // 256) + 4 if spec.double_quant else 4 * blocks
    return -(-numbers // 2) + scales


def standing_memory(layout: Layout, weights: BaseWeights, contract: FineTuneContract, dtype: str) -> dict[str, int]:
    """Bytes that a session holds whatever the batch, by part of an offer's memory.

    Exact for what is loaded: with lora the base in ``dtype``; with qlora its linears in NF4 and the rest in ``dtype``;
    the adapter, its gradients and its two moments in float32. What is trained whole is held as it is trained and not
    as the base has it; of a head that is tied to the embedding that takes more, since the other stays.

    Args:
        layout: of the base.
        weights: of the base.
        contract: for method, adapter and NF4 storage.
        dtype: ``float32`` or ``bfloat16``.
    """
    whole = whole_parameters(layout, contract.adapter)
    adapter = 4 * (adapter_parameters(weights, contract.adapter) + sum(whole.values()))
    dense = weights.parameters - sum(whole.values())
    if layout.tied and whole.keys() & {HEAD, *TABLES}:
        # The base's table is there for the one of the two that is not trained, or was one for both.
        dense += layout.vocab_size * layout.hidden_size
    parts = {"adapter": adapter, "gradients": adapter, "optimizer": 2 * adapter}
    width = 4 if dtype == "float32" else 2
    if contract.adapter.method == "lora":
        return {"base": width * dense, **parts}
    spec = NF4Spec(block_size=contract.quant.block_size, double_quant=contract.quant.double_quant)
    numbers = [out * into for out, into in weights.linears.values()]
    return {
        "base": width * (dense - sum(numbers)),
        "quantised_base": sum(nf4_bytes(number, spec) for number in numbers),
        **parts,
    }


def rows_memory(workload: Workload) -> int:
    """Bytes of host memory that the rows take once all have been looked at."""
    return int(workload.rows * (_BYTES_A_ROW + _BYTES_A_TOKEN * workload.row_tokens))


def states_memory(layout: Layout, adapter: AdapterSpec) -> int:
    """Bytes of host memory that copies of what is trained whole take; those of pairs alone are too small to count.

    The start is kept to the end. Beside it stand a checkpoint's adapter and moments while they are written.
    """
    return 4 * 4 * sum(whole_parameters(layout, adapter).values())


def step_costs(
    layout: Layout, weights: BaseWeights, contract: FineTuneContract, workload: Workload
) -> dict[str, float]:
    """Count the work of an average optimizer step.

    Args:
        layout: of the base.
        weights: of the base; what is not among ``linears`` is read, not multiplied, the head excepted.
        contract: for the adapter.
        workload: tokens and rows of a step, as the backend computes them: filled up, if it fills up.

    Returns:
        One number for each of ``COSTS``.
    """
    tokens, supervised, adapter = workload.tokens, workload.supervised, contract.adapter
    linear = sum(out * into for out, into in weights.linears.values())
    head = layout.vocab_size * layout.hidden_size
    adapted, whole = adapter_parameters(weights, adapter), whole_parameters(layout, adapter)
    # A head that is trained has three products.
    through = 6.0 if HEAD in whole else 4.0
    # Forward passes through the layers beside the first.
    more = 1.0 if contract.training.gradient_checkpointing else 0.0
    heads = layout.num_heads * layout.head_dim
    return {
        "products": (4.0 + 2.0 * more) * tokens * linear + through * supervised * head,
        "adapter": (6.0 + 2.0 * more) * tokens * adapted,
        "attention": (14.0 + 4.0 * more) * workload.pairs * layout.num_layers * heads,
        # Forward and backward share these about equally.
        "elementwise": (1.0 + 0.5 * more) * tokens * _elementwise(layout),
        "logits": supervised * layout.vocab_size,
        "weights": workload.batches * (2.0 * (linear + head) + more * linear),
        "layers": (1.0 + 0.5 * more) * workload.batches * layout.num_layers,
        "updates": float(adapted + sum(whole.values())),
    }


def step_seconds(costs: Mapping[str, float], speed: Speed) -> float:
    """Σ count · seconds per unit; a kind of work the speed does not name costs nothing."""
    return sum(count * speed.seconds.get(name, 0.0) for name, count in costs.items())


def _elementwise(layout: Layout) -> float:
    """Numbers that a token's norms, residuals, activation function and rotary embedding read and write, both ways."""
    width, inner = layout.hidden_size, layout.intermediate_size
    heads = (layout.num_heads + layout.num_kv_heads) * layout.head_dim
    gpt2 = layout.family == "gpt2"
    # Forward and backward together. Norm and residual, twice a layer: six passes; GELU: four; SiLU and the product
    # with its other half: nine; rotary: seven, and a norm of query and key as of the stream.
    block = 12 * width + (4 if gpt2 else 9) * inner
    block += 0 if gpt2 else 7 * heads
    block += 5 * heads if layout.family == "qwen3" else 0
    return float(layout.num_layers * block)
