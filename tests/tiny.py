"""Tiny models with logits of an honest size, packed batches, and plans made by hand, for the backends' tests.

The weights are drawn so that logits reach about 10, as a trained model's do: on logits near zero every mistake
is small, and a tolerance would prove nothing.
"""

import attrs
import numpy as np
import torch
import transformers

from mens_core.contract import FineTuneContract
from mens_core.exchange import IGNORE, Batch, BatchShape, NF4Spec
from mens_core.hf.inventory import middle_coverage
from mens_core.hf.layout import read_layout
from mens_core.plan import BaseWeights, ExecutionPlan, Machine

VOCABULARY = 97
SHAPE = BatchShape(rows=8, tokens=64, longest_row=24, supervised=64, batches=8)
MACHINE = Machine(platform="test", processor="test", python="3", cpu_count=1, memory_bytes=1 << 34)
WEIGHTS = BaseWeights(parameters=1, stored_bytes=4, linears={})

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 50,  # 2400 weights: no whole number of blocks of 64
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    # Conv1D, learned positions, tied head, biases everywhere
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # grouped queries, a head of its own, scaled rotary frequencies
    "llama": _COMMON
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": False,
    },
    # biases on q, k and v, tied head
    "qwen2": _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    # norms on q and k, heads wider than width / heads
    "qwen3": _COMMON
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": True},
}


def write_model(folder, model_type, config, seed=0):
    """Save a seeded random model as transformers saves any model."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**config))
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter is head or parameter is model.get_input_embeddings().weight:
                parameter.copy_(0.5 * drawn)
            elif parameter.ndim > 1:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_((1 if "norm" in name or "ln_" in name else 0) * (not name.endswith("bias")) + drawn / 8)
    model.save_pretrained(folder)


def plan_for(backend, folder, **fields):
    """A plan of this backend for a model folder: on the CPU, in float32 unless told otherwise."""
    fields = {"device": "cpu", "rank": 4, "alpha": 8.0} | fields
    contract = FineTuneContract.from_fields(trains=False, model=str(folder), **fields)
    layout = read_layout(folder)
    offer = backend.plan(contract, layout, MACHINE, WEIGHTS, None)
    assert offer.feasible, offer.reason
    method = contract.adapter.method
    return ExecutionPlan(
        contract=contract,
        layout=layout,
        backend=backend.name,
        execution_kernel=offer.kernel,
        runbook_kernel={"lora": "burn_lora", "qlora": "candle_qlora"}[method],
        candle_compat_mode=method == "qlora",
        contract_digest="",
        model_name=str(folder),
        model_dir=folder,
        tokenizer="hf",
        device=offer.device,
        dtype=offer.dtype,
        contents={},
        weights=WEIGHTS,
        coverage=middle_coverage(layout, (), method),
        limit_bytes=MACHINE.memory_bytes,
        offers=(offer,),
    )


def nf4_spec():
    """The spec of a contract's defaults."""
    return NF4Spec(block_size=64, double_quant=True)


def batch_of(*lengths, seed=0, supervised=0.6):
    """Rows of random tokens, packed; each position but a row's last is supervised with this probability."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, VOCABULARY, length) for length in lengths]
    targets = [
        np.append(np.where(generator.random(len(row) - 1) < supervised, row[1:], IGNORE), IGNORE) for row in rows
    ]
    return Batch(
        input_ids=np.concatenate(rows).astype(np.int32),
        positions=np.concatenate([np.arange(len(row)) for row in rows]).astype(np.int32),
        targets=np.concatenate(targets).astype(np.int32),
        row_lengths=np.array(lengths, np.int32),
    )


def with_tokens(batch, tokens):
    """The batch with other tokens, nothing supervised."""
    return attrs.evolve(batch, input_ids=tokens, targets=np.full_like(tokens, IGNORE))


def rows_of(batch):
    """Each row of a batch as a batch of its own."""
    ends = np.cumsum(batch.row_lengths)
    return [
        Batch(
            input_ids=batch.input_ids[end - length : end],
            positions=batch.positions[end - length : end],
            targets=batch.targets[end - length : end],
            row_lengths=np.array([length], np.int32),
        )
        for end, length in zip(ends, batch.row_lengths, strict=True)
    ]


def packed(rows):
    """Batches packed into one; the inverse of ``rows_of``."""
    return Batch(
        **{
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in ("input_ids", "positions", "targets", "row_lengths")
        }
    )


def random_adapter(adapter, seed=0, size=0.1):
    """Normal numbers under the names and shapes of an adapter."""
    generator = np.random.default_rng(seed)
    return {name: (size * generator.standard_normal(array.shape)).astype(np.float32) for name, array in adapter.items()}
