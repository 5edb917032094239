"""A training step of an 8 B model on one GPU, beside PEFT with bitsandbytes: tokens a second, MFU, peak memory.

    python benchmarks/gpu_step.py [--rounds 5] [--sequence 4096] [--rows 2] [--peak-tflops 989] [--trial]

A Llama 3 8B shape with random weights in bfloat16, rows of one length, all supervised, rank 16 on every linear layer,
layers computed again in the backward pass. Each variant in a process of its own, since each wants the whole device;
wall-clock seconds of steps that are waited for, the first two uncounted. ``--peak-tflops`` is the device's own bfloat16
peak without sparsity (989 of an H100 or H200 SXM, by NVIDIA's data sheet). ``--trial`` takes a tiny model and the
processor, to see that the script works. Published figures to stand beside: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import figures

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 512,
}
VARIANTS = ("peft", "peft_qlora", "torch_lora", "torch_qlora", "jax_lora", "jax_qlora")
RANK, RATE = 16, 1e-4


def main() -> None:
    """A line a variant, then the ratios that were set as goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma between")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.variant:
        print(json.dumps(measure(asked)))
        return
    shape = TINY if asked.trial else LLAMA_8B
    with tempfile.TemporaryDirectory() as folder:
        asked.model = write(Path(folder) / "model", shape)
        found = {name: json.loads(in_child(asked, name)) for name in asked.variants.split(",")}
    tokens = asked.rows * asked.sequence
    for name, one in found.items():
        middle = sorted(one["seconds"])[len(one["seconds"]) // 2]
        share = operations(shape, asked.rows, asked.sequence) / middle / 1e12 / asked.peak_tflops
        print(
            f"  {name}: {tokens / middle:,.0f} tokens/s, MFU {share:.1%}, peak {one['gib']:.1f} GiB, {one['loss']:.4f}"
        )
        if name in {"torch_lora", "jax_lora"}:
            figures.state("gpu", f"{name}, MFU", [share], [1.0], "the peak", ">= 0.45")
    seconds = {name: one["seconds"] for name, one in found.items()}
    for own, peer, goal in (
        ("torch_lora", "peft", ">= 2.0"),
        ("torch_qlora", "peft_qlora", ">= 2.0"),
        ("jax_lora", "peft", ">= 2.0"),
        ("jax_qlora", "peft_qlora", ">= 2.0"),
    ):
        if own in seconds and peer in seconds:
            figures.state("gpu", own, seconds[peer], seconds[own], f"{peer}'s speed", goal)
    for backend in ("torch", "jax"):
        lora, qlora = f"{backend}_lora", f"{backend}_qlora"
        if lora in seconds and qlora in seconds:
            figures.state("gpu", qlora, seconds[lora], seconds[qlora], f"{lora}'s speed", ">= 0.85")


def write(folder: Path, shape: dict[str, int]) -> Path:
    """Random weights, tensor by tensor."""
    import ml_dtypes
    import numpy as np

    from mens_core.artifacts.tensors import stream_tensors
    from mens_core.hf.keymap import tensor_shapes
    from mens_core.hf.layout import read_layout

    folder.mkdir()
    config = {
        **shape,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes, draw = tensor_shapes(read_layout(folder)), np.random.default_rng(0)

    def drawn(name: str):
        # One row of numbers, again and again: eight billion fresh ones would take longer than all the steps.
        row = (0.02 * draw.standard_normal(shapes[name][-1], np.float32)).astype(ml_dtypes.bfloat16)
        rows = shapes[name][0] if len(shapes[name]) == 2 else 1
        for start in range(0, rows, 4096):
            count = min(4096, rows - start)
            block = np.stack([np.roll(row, start + place) for place in range(count)])
            yield block if len(shapes[name]) == 2 else block[0]

    specs = {name: ("BF16", shape) for name, shape in shapes.items()}
    stream_tensors(folder / "model.safetensors", specs, drawn, {"format": "pt"})
    return folder


def in_child(asked: argparse.Namespace, variant: str) -> str:
    """One variant in a fresh process; several threads may feed the device."""
    words = ["--variant", variant, "--model", str(asked.model), "--rounds", str(asked.rounds)]
    words += ["--sequence", str(asked.sequence), "--rows", str(asked.rows), *(["--trial"] if asked.trial else [])]
    return figures.in_child(__file__, *words, environment={"OMP_NUM_THREADS": "8", "XLA_FLAGS": ""})


def measure(asked: argparse.Namespace) -> dict[str, object]:
    """Seconds of each step, the device's peak in GiB, and the last loss."""
    step, peak = (theirs if asked.variant.startswith("peft") else ours)(asked)
    spent, loss = [], 0.0
    for turn in range(-2, asked.rounds):
        begun = time.perf_counter()
        loss = step()
        if turn >= 0:
            spent.append(time.perf_counter() - begun)
    return {"seconds": spent, "gib": peak() / 2**30, "loss": loss}


def token_ids(asked: argparse.Namespace):
    """(rows, sequence) random ids."""
    import numpy as np

    vocabulary = json.loads((asked.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (asked.rows, asked.sequence), dtype=np.int32)


def ours(asked: argparse.Namespace):
    """(a step that is waited for, the device's peak)."""
    import numpy as np

    from mens_core.artifacts.adapter import initial_state
    from mens_core.contract import FineTuneContract
    from mens_core.planner import resolve
    from mens_core.text.pack import Batching, pack
    from mens_core.text.tokens import TokenRow, TokenRows

    contract = FineTuneContract.from_fields(
        trains=False,
        model=str(asked.model),
        tokenizer="lab",
        backend=asked.variant,
        dtype="bfloat16",
        rank=RANK,
        alpha=2.0 * RANK,
        device="cpu" if asked.trial else "auto",
        gradient_checkpointing=True,
    )
    plan, backend = resolve(contract, trains=False)
    rows = TokenRows.of([TokenRow(ids, np.ones(len(ids), bool)) for ids in token_ids(asked)])
    session = backend.open(plan, Batching(batch_size=len(rows), grad_accum=1, seed=0).shape(rows, 1))
    session = backend.restore(session, initial_state(backend.state(session).adapter, seed=0))
    window = [pack(rows)]

    def step() -> float:
        metrics = backend.step(session, window, RATE)
        return float(metrics.loss_sum) / metrics.supervised_tokens

    return step, peak_of_jax if asked.variant.startswith("jax") else peak_of_torch


def theirs(asked: argparse.Namespace):
    """As PEFT's documentation trains, with its own gradient checkpointing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cpu" if asked.trial else "cuda:0"
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if asked.variant == "peft_qlora"
        else None
    )
    base = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=torch.bfloat16, quantization_config=settings, device_map={"": device}
    )
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    ids = torch.from_numpy(token_ids(asked)).long().to(device)

    def step() -> float:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, peak_of_torch


def peak_of_torch() -> int:
    """Bytes; of a process on the processor, 0."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak_of_jax() -> int:
    """Bytes; of a process on the processor, 0."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def operations(shape: dict[str, int], rows: int, sequence: int) -> float:
    """Of one step, without what is computed again: frozen products forward and dX, LoRA's, causal attention, head."""
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linears = [(width, width)] * 2 + [(width, narrow)] * 2 + [(width, inner)] * 2 + [(inner, width)]
    tokens = rows * sequence
    body = layers * tokens * sum(2 * into * out for into, out in linears)
    lora = layers * tokens * sum(2 * RANK * (into + out) for into, out in linears)
    attention = layers * rows * 2 * sequence**2 * width
    return 2 * body + 3 * lora + 3.5 * attention + 2 * (2 * shape["vocab_size"] * width * tokens)


if __name__ == "__main__":
    main()
