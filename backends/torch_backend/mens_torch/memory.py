"""How much memory a run takes, part by part, from the model's numbers and its largest batch; needs no PyTorch.

What a layer keeps for the backward pass, in numbers a token, follows from ``_adapted``, ``_rms_norm``, ``_gated`` and
transformers' graphs and was checked against the tensors autograd saves (equal to the last one for GPT-2, Llama and
Qwen3). D width, F feed-forward width, H query and K key/value heads of width E, R rank::

    norms      2 D               what goes into each of the two; linears make what comes out again. Gemma: 4 D
    attention  2 H·E + 2 K·E     query, key, value, output; laid end to end it is made again
               H·E + K·E         Qwen3: query and key before their norms
    GPT-2      F, 2 F            before the activation function and, in bfloat16, behind it
    others     2 F, 3 F          gate and up and, in bfloat16, what goes into down
               4 F               Gemma and Phi-3: gate, its activation, up, and their product
    adapters   R                 x Aᵀ of each adapted linear

An RMS norm that is trained keeps its input in float32, what its weight is multiplied with, and what comes out, if
adapted linears read it.

With gradient checkpointing each layer keeps its input alone, D numbers, and one layer at a time what stands above.

On a CPU the demand is that of the whole process, and glibc's heap adds holes between what is kept and what is freed:
with PyTorch 2.13 an eighth of what is kept for GPT-2 in bfloat16, and a third for the rotary families, whose layers
make many short-lived tensors (measured by fixing the heap's thresholds, which takes the holes away); in float32, where
most of what is made is freed, 0.43 for GPT-2 and 0.7 for the others, and nearly so where bfloat16 is widened to it.
Before logits that lie beside the heap the holes are given back. Where layers are computed again, the holes are as large
as what such a layer keeps and makes, or two and a half times that in the rotary families (measured).
"""

from __future__ import annotations

from collections.abc import Iterable

from mens_core.compiled import MANY
from mens_core.contract import FineTuneContract
from mens_core.costs import adapted_linears, rows_memory, standing_memory, states_memory, whole_parameters
from mens_core.hf.families import REGISTRY
from mens_core.hf.fit import HEAD
from mens_core.hf.layout import Layout
from mens_core.plan import BaseWeights, Workload
from mens_torch._heap import MAPPED
from mens_torch._pages import AT_ONCE
from mens_torch._processor import multiplies_bfloat16

__all__ = ["memory_parts"]

_MIB = 1 << 20
# Of a process that has loaded PyTorch 2.13, transformers 5.23 and one model's code, and for qlora bitsandbytes 0.50
# and numba 0.68 with what it compiles; for lora the same to 3 MiB over the models tried.
_FRAMEWORK = {"lora": 400 * _MIB, "qlora": 540 * _MIB}
# Of lora, numba with the loops of GPT-2's activation function, and in bfloat16 of gates, where there is enough for
# them (_activations).
_LOOPS = 120 * _MIB
# A CUDA context with cuBLAS' workspace, as NVIDIA's tools commonly show it; not measured here.
_CUDA_FRAMEWORK = 600 * _MIB
# The chunk of ``loss.supervised_loss`` and the logits of it that pass the softmax together on a CPU.
_CHUNK, _IN_CACHE = 256, 1 << 19
# The piece of a weight that ``_widened`` brings into float32.
_PIECE = 2048
# Holes of the heap, as a share of what is kept, and short-lived tensors as wide as the feed-forward part.
_HOLES = {
    (True, "float32"): 0.43,
    (True, "bfloat16"): 0.13,
    (True, "widened"): 0.43,
    (False, "float32"): 0.7,
    (False, "bfloat16"): 0.33,
    (False, "widened"): 0.6,
}
_SHORT_LIVED = {True: 3, False: 6}
# Of a layer that is computed again, as a share of what it keeps and makes.
_HOLES_AGAIN = {True: 1.1, False: 2.5}
_SCRATCH = 16 * _MIB
# Families whose gate is not one node (_gated): another activation, or gate and up out of one linear.
_PLAIN_GATES = {"gemma2", "gemma3_text", "phi3"}
# Linears that read what came out of a block's first norm, and of the one before its feed-forward part.
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".qkv_proj", ".in_proj_qkv", ".in_proj_z")
_MLP = (".gate_proj", ".up_proj", ".gate_up_proj")
# Of the widest input that is dropped: its mask, and what is multiplied with it. Nothing of it is kept.
_MASKED = 2


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
    on_cpu, tokens = device == "cpu", workload.shape.tokens
    width = 4 if dtype == "float32" else 2
    every, kept = (tokens * part(contract, layout, weights, dtype) for part in (_made, _kept))
    short = _SHORT_LIVED[layout.family == "gpt2"] * tokens * layout.intermediate_size * width
    if contract.adapter.method == "qlora":
        # The memory that every NF4 weight is brought back into (``_scratch``).
        short += width * max((out * into for out, into in weights.linears.values()), default=0)
    chunk = min(_CHUNK, workload.shape.supervised)
    widened = on_cpu and dtype == "bfloat16" and not multiplies_bfloat16()
    if widened:
        # Float32 of a linear's input or slope, of a piece of its weight and of their product (_widened).
        short += 4 * tokens * (2 * layout.intermediate_size + min(layout.intermediate_size, _PIECE))
    if on_cpu:
        computed = "widened" if widened else dtype
        holes, scores = _holes(contract, layout, every, kept, short, computed), layout.vocab_size * chunk * width
        short += _SCRATCH + (holes if scores < MAPPED else max(0, holes - scores))
    if contract.adapter.dropout:
        short += _MASKED * tokens * layout.intermediate_size * width
    softmax = min(max(1, _IN_CACHE // layout.vocab_size), chunk) if on_cpu else chunk
    whole = whole_parameters(layout, contract.adapter)
    loops = layout.family == "gpt2" or (dtype == "bfloat16" and layout.family not in _PLAIN_GATES)
    loops &= contract.adapter.method == "lora" and tokens * layout.intermediate_size >= MANY
    standing, head = standing_memory(layout, weights, contract, dtype), whole.get(HEAD, 0)
    # A batch's own gradient of the head is there, beside the window's, before anything goes backward.
    standing["gradients"] += 4 * head
    # Beside it the head and a chunk's product in the run's format, where that is another than the master's.
    rounded = 2 * width * head if dtype != "float32" else 0
    # That of an embedding comes when nothing else is kept any more.
    table = 4 * max((numbers for name, numbers in whole.items() if name != HEAD), default=0)
    parts = {
        "framework": _FRAMEWORK[contract.adapter.method] + loops * _LOOPS if on_cpu else _CUDA_FRAMEWORK,
        **standing,
        "activations": max(kept + short, table),
        "logits": layout.vocab_size * (chunk * width + 2 * softmax * 4) + rounded,
    }
    loading = _loading(contract, weights, width, parts, loops * _LOOPS) if on_cpu else 0
    host = {"rows": rows_memory(workload), "states": states_memory(layout, contract.adapter)} if on_cpu else {}
    return parts | {"loading": loading, "rows": 0, **host}


def _kept(contract: FineTuneContract, layout: Layout, weights: BaseWeights, dtype: str) -> int:
    """Bytes a token that wait for the backward pass."""
    every = _made(contract, layout, weights, dtype)
    if not contract.training.gradient_checkpointing:
        return every
    width = 4 if dtype == "float32" else 2
    return layout.num_layers * width * layout.hidden_size + every // layout.num_layers


def _holes(contract: FineTuneContract, layout: Layout, every: int, kept: int, short: int, computed: str) -> int:
    """Bytes of the heap's holes, from those that all layers make, that are kept, and that live for a short time."""
    gpt2 = layout.family == "gpt2"
    plain = int(_HOLES[gpt2, computed] * every)
    if not contract.training.gradient_checkpointing:
        return plain
    # In few layers there is little to save, but nothing to lose.
    return min(int(_HOLES_AGAIN[gpt2] * (every // layout.num_layers + short)), every + plain - kept)


def _made(contract: FineTuneContract, layout: Layout, weights: BaseWeights, dtype: str) -> int:
    """Bytes a token of all layers' products and inputs; the graph of an unknown family is taken for Llama's."""
    width = 4 if dtype == "float32" else 2
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    gpt2, plain = layout.family == "gpt2", layout.family in _PLAIN_GATES
    norms = 2 if layout.family is None else len(REGISTRY[layout.family].norms)
    gate = 1 if gpt2 else 3 if plain else 2
    block = norms * layout.hidden_size + 2 * query + 2 * key + gate * layout.intermediate_size
    block += query + key if layout.family == "qwen3" else 0
    adapted = adapted_linears(weights, contract.adapter)
    # A linear without an adapter does not keep its input; what a norm or a node of ours made is made again (_remade).
    kept = {".out_proj": query}
    if plain or dtype != "float32":
        kept[".mlp.c_proj" if gpt2 else ".down_proj"] = layout.intermediate_size
    block += sum(
        numbers
        for reader, numbers in kept.items()
        if (layout.family is None and reader != ".out_proj") or any(path.endswith(reader) for path in adapted)
    )
    trained = sum(_of_trained(layout, name, width, adapted) for name in whole_parameters(layout, contract.adapter))
    ranks = sum(contract.adapter.rank_of(path) for path in adapted)
    return width * (layout.num_layers * block + ranks) + trained


def _of_trained(layout: Layout, name: str, width: int, adapted: Iterable[str]) -> int:
    """Bytes a token that a tensor of a layer keeps more because it is trained: an RMS norm's weight, others nothing."""
    block, _, norm = name.removesuffix(".weight").rpartition(".")
    heads = {"q_norm": layout.num_heads, "k_norm": layout.num_kv_heads}
    norms: tuple[str, ...] = ()
    if layout.family is not None and layout.family != "gpt2":
        norms = REGISTRY[layout.family].norms
    if norm in heads:
        return 4 * heads[norm] * layout.head_dim
    if norm not in norms:
        return 0
    # Gemma's second and fourth are read by no linear.
    readers = {norms[0]: _ATTENTION, norms[1 if len(norms) == 2 else 2]: _MLP}.get(norm, ())
    read = any(path.startswith(f"{block}.") and path.endswith(readers) for path in adapted)
    return (4 + (width if read else 0)) * layout.hidden_size


def _loading(contract: FineTuneContract, weights: BaseWeights, width: int, parts: dict[str, int], loops: int) -> int:
    """What the mapped files take beyond what training then holds.

    With qlora a little of them at a time, of which only the NF4 is kept. With lora a file stays as it is read, or is
    made into another number format and then let go.
    """
    if contract.adapter.method == "qlora":
        return AT_ONCE
    if weights.stored_bytes == width * weights.parameters:
        return 0
    later = loops + sum(parts[name] for name in ("gradients", "optimizer", "activations", "logits"))
    return max(0, weights.stored_bytes - later)
