"""How much memory a run takes, part by part, from the model's numbers and its largest batch; needs no PyTorch.

What a layer keeps for the backward pass, in numbers a token, follows from ``lora`` and transformers' graphs and was
checked against the tensors autograd saves (equal to the last one for GPT-2, Llama and Qwen3). D width, F feed-forward
width, H query and K key/value heads of width E, R rank::

    norms      4 D                   what goes into each of the two, and what comes out, which its linears share;
                                     Gemma has four norms, and so 2 D more; GPT-2's linears make it again: 2 D
    attention  2 H·E + 2 K·E         query, key, value, output; laid end to end it is made again
               H·E + K·E             Qwen3: query and key before their norms
    GPT-2      F, 2 F in bfloat16    before the activation function and, where it is not made again, behind it
    others     4 F                   gate, its activation, up, and their product
    adapters   R                     x Aᵀ of each adapted linear

    trained    D or H·E, K·E      an RMS norm that is trained: what its weight is multiplied with

With gradient checkpointing each layer keeps its input alone, D numbers, and one layer at a time what stands above.

On a CPU the demand is that of the whole process, and glibc's heap adds holes between what is kept and what is freed:
with PyTorch 2.13 an eighth of what is kept for GPT-2 in bfloat16, and a third for the rotary families, whose layers
make many short-lived tensors (measured by fixing the heap's thresholds, which takes the holes away); 0.43 for GPT-2 in
float32, where most of what is made is freed. Before logits that lie beside the heap the holes are given back. Where
layers are computed again, the holes are about as large as what such a layer keeps and makes (measured).
"""

from __future__ import annotations

from mens_core.contract import FineTuneContract
from mens_core.costs import adapted_linears, rows_memory, standing_memory, states_memory, whole_parameters
from mens_core.hf.families import REGISTRY
from mens_core.hf.fit import HEAD
from mens_core.hf.layout import Layout
from mens_core.plan import BaseWeights, Workload
from mens_torch._heap import MAPPED
from mens_torch._pages import AT_ONCE

__all__ = ["memory_parts"]

_MIB = 1 << 20
# Of a process that has loaded PyTorch 2.13, transformers 5.23 and one model's code, and for qlora bitsandbytes 0.50
# and numba 0.68 with what it compiles; for lora the same to 3 MiB over the models tried.
_FRAMEWORK = {"lora": 400 * _MIB, "qlora": 540 * _MIB}
# A CUDA context with cuBLAS' workspace, as NVIDIA's tools commonly show it; not measured here.
_CUDA_FRAMEWORK = 600 * _MIB
# The chunk of ``loss.supervised_loss`` and the logits of it that pass the softmax together on a CPU.
_CHUNK, _IN_CACHE = 256, 1 << 19
# Holes of the heap, as a share of what is kept, and short-lived tensors as wide as the feed-forward part.
_HOLES = {(True, "float32"): 0.43, (True, "bfloat16"): 0.13, (False, "float32"): 0.33, (False, "bfloat16"): 0.33}
_SHORT_LIVED = {True: 3, False: 6}
# Of a layer that is computed again, as a share of what it keeps and makes.
_HOLES_AGAIN = {True: 1.1, False: 1.35}
_SCRATCH = 16 * _MIB
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
    if on_cpu:
        holes, scores = _holes(contract, layout, every, kept, short, dtype), layout.vocab_size * chunk * width
        short += _SCRATCH + (holes if scores < MAPPED else max(0, holes - scores))
    if contract.adapter.dropout:
        short += _MASKED * tokens * layout.intermediate_size * width
    softmax = min(max(1, _IN_CACHE // layout.vocab_size), chunk) if on_cpu else chunk
    whole = whole_parameters(layout, contract.adapter)
    standing, head = standing_memory(layout, weights, contract, dtype), whole.get(HEAD, 0)
    # A batch's own gradient of the head is there, beside the window's, before anything goes backward.
    standing["gradients"] += 4 * head
    # Beside it the head and a chunk's product in the run's format, where that is another than the master's.
    rounded = 2 * width * head if dtype != "float32" else 0
    # That of an embedding comes when nothing else is kept any more.
    table = 4 * max((numbers for name, numbers in whole.items() if name != HEAD), default=0)
    parts = {
        "framework": _FRAMEWORK[contract.adapter.method] if on_cpu else _CUDA_FRAMEWORK,
        **standing,
        "activations": max(kept + short, table),
        "logits": layout.vocab_size * (chunk * width + 2 * softmax * 4) + rounded,
    }
    loading = _loading(contract, weights, width, parts) if on_cpu else 0
    host = {"rows": rows_memory(workload), "states": states_memory(layout, contract.adapter)} if on_cpu else {}
    return parts | {"loading": loading, "rows": 0, **host}


def _kept(contract: FineTuneContract, layout: Layout, weights: BaseWeights, dtype: str) -> int:
    """Bytes a token that wait for the backward pass."""
    every = _made(contract, layout, weights, dtype)
    if not contract.training.gradient_checkpointing:
        return every
    width = 4 if dtype == "float32" else 2
    return layout.num_layers * width * layout.hidden_size + every // layout.num_layers


def _holes(contract: FineTuneContract, layout: Layout, every: int, kept: int, short: int, dtype: str) -> int:
    """Bytes of the heap's holes, from those that all layers make, that are kept, and that live for a short time."""
    gpt2 = layout.family == "gpt2"
    plain = int(_HOLES[gpt2, dtype] * every)
    if not contract.training.gradient_checkpointing:
        return plain
    # In few layers there is little to save, but nothing to lose.
    return min(int(_HOLES_AGAIN[gpt2] * (every // layout.num_layers + short)), every + plain - kept)


def _made(contract: FineTuneContract, layout: Layout, weights: BaseWeights, dtype: str) -> int:
    """Bytes a token of all layers' products and inputs; the graph of an unknown family is taken for Llama's."""
    width = 4 if dtype == "float32" else 2
    query, key = layout.num_heads * layout.head_dim, layout.num_kv_heads * layout.head_dim
    gpt2 = layout.family == "gpt2"
    # An RMS norm keeps a float32 copy of what goes in.
    wide = width if gpt2 else 4
    norms = 2 if layout.family is None else len(REGISTRY[layout.family].norms)
    block = norms * wide * layout.hidden_size + width * (
        2 * query + 2 * key + (1 if gpt2 else 3) * layout.intermediate_size
    )
    block += wide * (query + key) if layout.family == "qwen3" else 0
    adapted = adapted_linears(weights, contract.adapter)
    # A linear without an adapter does not keep its input.
    for readers, numbers in _inputs(layout, dtype):
        if layout.family is None or any(path.endswith(readers) for path in adapted):
            block += width * numbers
    trained = 0 if gpt2 else sum(_norm_width(layout, name) for name in whole_parameters(layout, contract.adapter))
    ranks = sum(contract.adapter.rank_of(path) for path in adapted)
    return layout.num_layers * block + width * (trained + ranks)


def _norm_width(layout: Layout, name: str) -> int:
    """Numbers a token that pass through a layer's norm; 0 for what is none."""
    heads = {"q_norm": layout.num_heads, "k_norm": layout.num_kv_heads}.get(name.split(".")[-2])
    if heads is not None:
        return heads * layout.head_dim
    return layout.hidden_size if "norm" in name and ".layers." in name else 0


def _inputs(layout: Layout, dtype: str) -> list[tuple[tuple[str, ...], int]]:
    """(linears that share an input which is kept, its numbers a token) of a layer; others are made again (_remade)."""
    width, inner, query = layout.hidden_size, layout.intermediate_size, layout.num_heads * layout.head_dim
    if layout.family == "gpt2":
        return [] if dtype == "float32" else [((".mlp.c_proj",), inner)]
    attention = (".q_proj", ".k_proj", ".v_proj", ".qkv_proj", ".in_proj_qkv", ".in_proj_z")
    return [
        (attention, width),
        ((".out_proj",), query),
        ((".gate_proj", ".up_proj", ".gate_up_proj"), width),
        ((".down_proj",), inner),
    ]


def _loading(contract: FineTuneContract, weights: BaseWeights, width: int, parts: dict[str, int]) -> int:
    """What the mapped files take beyond what training then holds.

    With qlora a little of them at a time, of which only the NF4 is kept. With lora a file stays as it is read, or is
    made into another number format and then let go.
    """
    if contract.adapter.method == "qlora":
        return AT_ONCE
    if weights.stored_bytes == width * weights.parameters:
        return 0
    later = sum(parts[name] for name in ("gradients", "optimizer", "activations", "logits"))
    return max(0, weights.stored_bytes - later)
