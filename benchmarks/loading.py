"""Loading two gigabytes of weights: into JAX as they are, and into NF4 on both backends, each in a fresh process.

    python benchmarks/loading.py [--rounds 5]

A Llama-shaped base in bfloat16: 2.0 GB. Against safetensors' own ``load_file`` for Flax, and against transformers with
BitsAndBytesConfig. Wall-clock seconds without the imports, on one core, and the peak of resident memory above them,
in which pages of mapped files count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import figures

LAYERS, WIDTH, INNER, VOCABULARY = 14, 2048, 8192, 32_000


def main() -> None:
    """Each in a process of its own, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(measure(asked.work, asked.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write(model, asked.layers)
        size = (model / "model.safetensors").stat().st_size
        print(f"  {size / 1e9:.2f} GB")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
        for _ in range(asked.rounds):
            for name in WORK:
                found[name].append(json.loads(figures.in_child(__file__, "--work", name, "--model", str(model))))
    say(found, size)


def write(folder: Path, layers: int) -> None:
    """A random base."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="8GB")


def measure(name: str, model: Path) -> dict[str, float]:
    """Seconds, MiB above the imports, and MiB of NF4 where there is some."""
    figures.one_core()
    work = WORK[name](model)
    before = figures.forget_peak()
    begun = time.perf_counter()
    held = work()
    seconds = time.perf_counter() - begun
    del held
    return {"seconds": seconds, "mib": figures.resident("VmHWM") - before}


def flax(model: Path):
    """As safetensors' documentation loads."""
    import jax
    from safetensors.flax import load_file

    jax.numpy.zeros(1).block_until_ready()
    return lambda: jax.block_until_ready(load_file(model / "model.safetensors"))


def bitsandbytes(model: Path):
    """As transformers' documentation quantises while it loads."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )


def session(model: Path, kernel: str):
    """As a run opens its base, with an adapter of rank 1."""
    import numpy as np

    from mens_core.contract import FineTuneContract
    from mens_core.exchange import BatchShape
    from mens_core.planner import resolve

    contract = FineTuneContract.from_fields(
        trains=False, model=str(model), tokenizer="lab", backend=kernel, dtype="bfloat16", rank=1, device="cpu"
    )
    plan, backend = resolve(contract, trains=False)
    if kernel.startswith("jax"):
        import jax

        jax.numpy.zeros(1).block_until_ready()
    if kernel.endswith("qlora"):
        from mens_core import nf4
        from mens_core.exchange import NF4Spec

        # The loop that stores is kept on disk from the first time on; no user waits for it twice.
        nf4.quantize(np.ones((64, 64), np.float32), NF4Spec(), 1)
    return lambda: backend.open(plan, BatchShape(rows=1, tokens=64, longest_row=64, supervised=16, batches=1))


WORK = {
    "flax": flax,
    "jax_lora": lambda model: session(model, "jax_lora"),
    "bitsandbytes": bitsandbytes,
    "torch_qlora": lambda model: session(model, "torch_qlora"),
    "jax_qlora": lambda model: session(model, "jax_qlora"),
}


def say(found: dict[str, list[dict[str, float]]], size: int) -> None:
    """Ratios by round."""
    seconds, mib = (
        {name: [one[key] for one in rounds] for name, rounds in found.items()} for key in ("seconds", "mib")
    )
    for name in found:
        print(f"  {name}: {min(seconds[name]):.2f} s, {max(mib[name]):.0f} MiB above the imports")
    rounds = len(seconds["flax"])
    what = "a 2 GB base into JAX"
    figures.state(11, what, seconds["flax"], seconds["jax_lora"], "safetensors.flax.load_file's speed", ">= 2.5")
    figures.state(11, f"{what}, peak", mib["jax_lora"], [size / 2**20] * rounds, "its size", "<= 1.1")
    # What stays in bfloat16 besides, which no NF4 takes the place of: the embedding and the norms.
    embedding, linear = VOCABULARY * WIDTH * 2 / 2**20, (size - VOCABULARY * WIDTH * 2) / 2 / 2**20
    allowed = linear * 4.127 / 8 + embedding + 2 * embedding
    for kernel, name in (("torch_qlora", "torch"), ("jax_qlora", "JAX")):
        what = f"2 GB into NF4, {name}"
        peer = "transformers' speed with BitsAndBytesConfig"
        figures.state(12, what, seconds["bitsandbytes"], seconds[kernel], peer, ">= 5.0")
        bound = "NF4, embedding and twice the largest tensor"
        figures.state(12, f"{what}, peak", mib[kernel], [allowed] * rounds, bound, "<= 1.0")


if __name__ == "__main__":
    main()
