"""One LoRA step of ours against PEFT's, on the same weights and rows, side by side in one run.

    make bench         or         python benchmarks/training_step.py [--rounds 5] [--layers 4] [--dtype float32]

A GPT-2-shaped model (width 768, vocabulary 50,257, random weights), four rows of 118 to 414 tokens of which the last
30 % are supervised. PEFT runs as its documentation shows: rows padded to the longest, labels masked, the model's own
loss. Ours packs the rows and puts the head on supervised positions only. Variants take turns, in rotated order, on one
thread; what is compared is the process's CPU time, round by round, and the median ratio is printed. The losses must
agree to 1e-4 or nothing is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# One thread: two of them on a shared machine measure the neighbours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from mens_core.artifacts.adapter import initial_state
from mens_core.contract import FineTuneContract
from mens_core.planner import resolve
from mens_core.text.pack import Batching, pack
from mens_core.text.tokens import TokenRow, TokenRows

LENGTHS = (118, 216, 316, 414)
SUPERVISED = 0.3
RANK = 16
RATE = 1e-4

Step = Callable[[], float]


def main() -> None:
    """Measure and print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = _write_model(Path(folder) / "model", arguments.layers)
        rows = _rows(50257)
        steps: dict[str, Step] = {"peft": _peft_step(model_dir, rows, arguments.dtype)}
        for kernel in ("torch_lora", "torch_qlora", "jax_lora"):
            steps[kernel] = _our_step(model_dir, rows, kernel, arguments.dtype)
        _compare(steps, arguments.rounds, sum(LENGTHS), f"{arguments.layers} layers, {arguments.dtype}")


def _write_model(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _rows(vocabulary: int) -> list[TokenRow]:
    random = np.random.Generator(np.random.Philox(key=0))
    return [
        TokenRow(random.integers(0, vocabulary, n, dtype=np.int32), np.arange(n) >= n * (1 - SUPERVISED))
        for n in LENGTHS
    ]


def _our_step(model_dir: Path, rows: list[TokenRow], kernel: str, dtype: str) -> Step:
    contract = FineTuneContract.from_fields(
        trains=False,
        model=str(model_dir),
        tokenizer="lab",
        backend=kernel,
        dtype=dtype,
        rank=RANK,
        alpha=2.0 * RANK,
        device="cpu",
    )
    plan, backend = resolve(contract, trains=False)
    session = backend.open(plan, Batching(batch_size=len(rows), grad_accum=1, seed=0).shape(TokenRows.of(rows), 1))
    session = backend.restore(session, initial_state(backend.state(session).adapter, seed=0))
    window = [pack(TokenRows.of(rows))]

    def step() -> float:
        metrics = backend.step(session, window, RATE)
        return float(metrics.loss_sum) / metrics.supervised_tokens

    return step


def _peft_step(model_dir: Path, rows: list[TokenRow], dtype: str) -> Step:
    base = GPT2LMHeadModel.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    linears = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, fan_in_fan_out=True)
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    batch = _padded(rows)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _padded(rows: list[TokenRow]) -> dict[str, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length] = torch.from_numpy(row.input_ids)
        labels[place, :length] = torch.where(torch.from_numpy(row.supervised), ids[place, :length], -100)
        mask[place, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _compare(steps: dict[str, Step], rounds: int, tokens: int, what: str) -> None:
    losses = {name: step() for name, step in steps.items()}
    # NF4 changes the base, so QLoRA's loss is another one.
    exact = [loss for name, loss in losses.items() if not name.endswith("qlora")]
    if "float32" in what and max(exact) - min(exact) > 1e-4:
        raise SystemExit(f"the losses differ, so there is nothing to compare: {losses}")
    spent: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.process_time()
            steps[name]()
            spent[name].append(time.process_time() - begun)
    packages = ("torch", "transformers", "peft", "jax")
    print(f"{what}; {platform.processor() or platform.machine()}, one thread; " + _versions(packages))
    for name, seconds in spent.items():
        ratios = sorted(base / own for base, own in zip(spent["peft"], seconds, strict=True))
        print(
            f"FIGURE training_step {name}: {statistics.median(ratios):.2f} x PEFT [{ratios[0]:.2f} {ratios[-1]:.2f}], "
            f"{tokens / statistics.median(seconds):,.0f} tokens per CPU second, loss {losses[name]:.4f}"
        )


def _versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{package} {version(package)}" for package in packages)


if __name__ == "__main__":
    main()
