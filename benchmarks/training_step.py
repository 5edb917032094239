"""One optimizer step of ours against PEFT's, on the same weights and rows, side by side in one run.

    python benchmarks/training_step.py [--shape gpt2] [--dtype float32] [--rows real] [--rounds 5] [--allocator default]

Shapes: GPT-2 small (12 layers of width 768, vocabulary 50,257), and Qwen (8 layers of 512, vocabulary 151,936, of whose
linear work the head is 77 %: far more than in a large model). Random weights, rank 16 on every linear layer.

    real    four rows of 118 to 414 tokens, the last 30 % of each supervised
    dense   two rows of 256 tokens, all supervised: nothing to skip

PEFT runs as its documentation shows: rows padded to the longest, labels masked, the model's own loss; and ``grouped``,
where no row is padded at all, as grouping by length does at its best: one row after the other, one update. Ours packs
the rows and puts the head on supervised positions only. Variants take turns on one core; what is compared is the
process's CPU time, round by round. In float32 the losses must agree to 1e-4 or nothing is printed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import figures

figures.one_core()

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen2Config

from mens_core.artifacts.adapter import initial_state
from mens_core.contract import FineTuneContract
from mens_core.planner import resolve
from mens_core.text.pack import Batching, pack
from mens_core.text.tokens import TokenRow, TokenRows

LENGTHS = {"real": (118, 216, 316, 414), "dense": (256, 256)}
SUPERVISED = {"real": 0.3, "dense": 1.0}
RANK = 16
RATE = 1e-4
OURS = {"torch_lora": "torch LoRA", "torch_qlora": "torch QLoRA", "jax_lora": "JAX LoRA", "jax_qlora": "JAX QLoRA"}
GOALS = {
    # (shape, rows, variant, peer, allocator) → the table's number and bound.
    ("gpt2", "real", "torch_lora", "peft", "default"): (1, ">= 2.5"),
    ("gpt2", "real", "torch_lora", "peft", "pages kept"): (1, ">= 2.5"),
    ("gpt2", "real", "torch_lora", "grouped", "default"): (1, ">= 1.8"),
    ("gpt2", "real", "torch_lora", "grouped", "pages kept"): (1, ">= 1.8"),
    ("qwen", "real", "torch_lora", "peft", "default"): (2, ">= 5.0"),
    ("qwen", "real", "torch_lora", "peft", "pages kept"): (2, ">= 3.5"),
    ("qwen", "real", "torch_qlora", "peft_qlora", "default"): (7, ">= 3.5"),
    ("gpt2", "dense", "torch_lora", "peft", "default"): (4, ">= 1.1"),
    ("gpt2", "dense", "torch_lora", "peft", "pages kept"): (4, ">= 1.0"),
    ("qwen", "dense", "torch_lora", "peft", "default"): (4, ">= 1.1"),
    ("qwen", "dense", "torch_lora", "peft", "pages kept"): (4, ">= 1.0"),
}
USEFUL = {"float32": ">= 0.70", "bfloat16": ">= 0.65"}

Step = Callable[[], float]


def main() -> None:
    """Measure one case and print one line a claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=("gpt2", "qwen"), default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", choices=tuple(LENGTHS), default="real")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--variants", default="peft,grouped,torch_lora,torch_qlora,jax_lora", help="comma between")
    parser.add_argument("--allocator", choices=tuple(figures.ALLOCATORS), default="default", help="what the lines say")
    parser.add_argument("--memory", help="a variant: only its peak above the model in two steps, in MiB")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", asked.shape, asked.layers, asked.dtype)
        if asked.memory:
            step = make(model, asked.memory, asked)
            print(figures.private_peak(lambda: (step(), step())))
            return
        compare({name: make(model, name, asked) for name in asked.variants.split(",")}, asked)


def write_model(folder: Path, shape: str, layers: int | None = None, dtype: str = "float32") -> Path:
    """A random model in safetensors."""
    torch.manual_seed(0)
    if shape == "gpt2":
        config = GPT2Config(n_layer=layers or 12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        config = Qwen2Config(
            hidden_size=512,
            num_hidden_layers=layers or 8,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=1408,
            vocab_size=151_936,
            tie_word_embeddings=True,
        )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def token_rows(model: Path, kind: str) -> list[TokenRow]:
    """Random tokens, of which each row's last ones are supervised."""
    random, vocabulary = np.random.Generator(np.random.Philox(key=0)), AutoConfig.from_pretrained(model).vocab_size
    return [
        TokenRow(random.integers(0, vocabulary, n, dtype=np.int32), np.arange(n) >= n * (1 - SUPERVISED[kind]))
        for n in LENGTHS[kind]
    ]


def make(model: Path, variant: str, asked: argparse.Namespace) -> Step:
    """A function that takes one step and returns the mean loss before it."""
    rows = token_rows(model, asked.rows)
    kernel, _, checkpointed = variant.partition("+")
    if kernel in OURS:
        fields = {"gradient_checkpointing": True} if checkpointed else {}
        return our_step(model, rows, kernel, asked.dtype, **fields)
    return peft_step(model, rows, kernel, asked.dtype, checkpointed=bool(checkpointed))


def our_step(model: Path, rows: list[TokenRow], kernel: str, dtype: str, **fields: object) -> Step:
    """As a run takes it: the hook that trains, on a window of one batch."""
    session, backend = open_session(model, rows, kernel, dtype, **fields)
    window = [pack(TokenRows.of(rows))]

    def step() -> float:
        metrics = backend.step(session, window, RATE)
        return float(metrics.loss_sum) / metrics.supervised_tokens

    return step


def open_session(model: Path, rows: list[TokenRow], kernel: str, dtype: str, **fields: object):
    """(session, backend): a run's first moment, with room for all rows in one batch."""
    contract = FineTuneContract.from_fields(
        trains=False,
        model=str(model),
        tokenizer="lab",
        backend=kernel,
        dtype=dtype,
        rank=RANK,
        alpha=2.0 * RANK,
        device="cpu",
        **fields,
    )
    plan, backend = resolve(contract, trains=False)
    session = backend.open(plan, Batching(batch_size=len(rows), grad_accum=1, seed=0).shape(TokenRows.of(rows), 1))
    return backend.restore(session, initial_state(backend.state(session).adapter, seed=0)), backend


def peft_step(model: Path, rows: list[TokenRow], variant: str, dtype: str, *, checkpointed: bool) -> Step:
    """As PEFT's documentation trains."""
    number = getattr(torch, dtype)
    quantised = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=number)
        if variant == "peft_qlora"
        else None
    )
    placed = {"device_map": {"": "cpu"}} if quantised else {}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=number, quantization_config=quantised, **placed)
    gpt2 = base.config.model_type == "gpt2"
    linears = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"] if gpt2 else "all-linear"
    wrapped = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, fan_in_fan_out=gpt2))
    if checkpointed:
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.enable_input_require_grads()
    wrapped.train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    # The tokens a padded batch's loss is the mean of; a row's first token is nobody's target.
    counts = [int(row.supervised[1:].sum()) for row in rows]
    batches = [padded([row]) for row in rows] if variant == "grouped" else [padded(rows)]
    shares = [count / sum(counts) for count in counts] if variant == "grouped" else [1.0]

    def step() -> float:
        total = 0.0
        for batch, share in zip(batches, shares, strict=True):
            loss = wrapped(**batch).loss * share
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def padded(rows: list[TokenRow]) -> dict[str, torch.Tensor]:
    """One rectangle, labels masked."""
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


def compare(steps: dict[str, Step], asked: argparse.Namespace) -> None:
    """Losses first, then the ratios."""
    losses = {name: step() for name, step in steps.items()}
    # NF4 changes the base, so QLoRA's loss is another one.
    exact = [loss for name, loss in losses.items() if "qlora" not in name]
    if asked.dtype == "float32" and max(exact) - min(exact) > 1e-4:
        raise SystemExit(f"the losses differ, so there is nothing to compare: {losses}")
    # Under the Qwen shape half of PEFT's time goes to fresh pages; with pages kept, user time leaves them out.
    user_time = asked.shape == "qwen" and asked.allocator == "pages kept"
    spent = figures.in_turns(steps, asked.rounds, user_seconds if user_time else time.process_time, warm=True)
    layers = f" of {asked.layers} layers" if asked.layers else ""
    case = f"{asked.shape}{layers}, {asked.dtype}, {asked.rows} rows{', user time' if user_time else ''}"
    tokens = sum(LENGTHS[asked.rows])
    for name, seconds in spent.items():
        print(f"  {case}: {name} {tokens / statistics.median(seconds):,.0f} tokens per CPU second, {losses[name]:.4f}")
    for own in (name for name in spent if name in OURS):
        for peer in (name for name in ("peft", "grouped", "peft_qlora") if name in spent):
            shape = "" if asked.layers else asked.shape
            row, goal = GOALS.get((shape, asked.rows, own, peer, asked.allocator), ("-", ""))
            what = f"{OURS[own]} step, {case}"
            figures.state(row, what, spent[peer], spent[own], peer, goal, asked.allocator)
    if {"torch_lora", "torch_qlora"} <= spent.keys():
        what = f"torch QLoRA step, {case}"
        figures.state(7, what, spent["torch_qlora"], spent["torch_lora"], "LoRA's time", "<= 1.05", asked.allocator)
    if {"torch_lora", "jax_lora"} <= spent.keys():
        goal = ">= 0.8" if asked.dtype == "float32" else ""
        what = f"JAX LoRA step, {case}"
        figures.state(8, what, spent["torch_lora"], spent["jax_lora"], "our torch step's speed", goal, asked.allocator)
    if "torch_lora" in spent and asked.shape == "gpt2" and not asked.layers:
        useful_share(spent["torch_lora"], case, asked)


def useful_share(seconds: list[float], case: str, asked: argparse.Namespace) -> None:
    """The work that the mathematics needs, by the fastest products of this run, over what was spent."""
    a, b = (torch.randn(2048, 2048, dtype=getattr(torch, asked.dtype)) for _ in range(2))
    ways: dict[str, Callable[[], object]] = {"PyTorch's": lambda: a @ b}
    if asked.dtype == "float32":
        ways["oneDNN's"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # noqa: SLF001
    spent = figures.in_turns(ways, 7)
    needed = operations(asked.rows) / (2 * 2048**3 / min(min(seconds) for seconds in spent.values()))
    what = f"useful share of the machine's products, {case}"
    goal = USEFUL[asked.dtype] if asked.rows == "real" else ""
    figures.state(5, what, [needed] * len(seconds), seconds, "all of it", goal, asked.allocator)


def operations(rows: str) -> float:
    """Of one step on GPT-2 small: frozen products forward and dX, LoRA's with dW, causal attention, the head."""
    width, layers, vocabulary = 768, 12, 50_257
    linears = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    tokens, supervised = sum(LENGTHS[rows]), sum(int(n * SUPERVISED[rows]) for n in LENGTHS[rows])
    body = layers * tokens * sum(2 * into * out for into, out in linears)
    lora = layers * tokens * sum(2 * RANK * (into + out) for into, out in linears)
    attention = layers * sum(2 * n * n * width for n in LENGTHS[rows])
    return 2 * body + 3 * lora + 3.5 * attention + 2 * (2 * vocabulary * width * supervised)


def user_seconds() -> float:
    """Of this process, without what the kernel spent on its pages."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


if __name__ == "__main__":
    main()
