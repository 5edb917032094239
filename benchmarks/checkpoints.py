"""What saving a checkpoint costs the loop, as a share of a step at the default interval.

    python benchmarks/checkpoints.py [--rounds 7] [--layers 4] [--steps 6] [--kernels torch_lora …]

A GPT-2-shaped model (width 768, vocabulary 50,257, random weights), one window of four rows of 118 to 414 tokens, rank
16 on all linears. Some steps with a save before them, which a thread writes meanwhile, and as many without, take turns.
What the steps with the save take longer, copying the state and handing it over included, is divided by a hundred steps,
after which the next save comes. It is CPU time of the process, so that all that the writing thread does counts as if
the loop had waited for it: an upper bound, which another core lowers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import attrs
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mens_core.artifacts.adapter import initial_state
from mens_core.artifacts.checkpoints import Checkpoint
from mens_core.contract import FineTuneContract
from mens_core.planner import resolve
from mens_core.sections import CheckpointSpec
from mens_core.text.pack import Batching, pack
from mens_core.text.tokens import TokenRow, TokenRows
from mens_core.training.progress import Progress
from mens_core.training.saver import Saver
from mens_core.training.telemetry import Telemetry

LENGTHS = (118, 216, 316, 414)
SUPERVISED = 0.3


def main() -> None:
    """Measure and print one line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kernels", nargs="+", default=["torch_lora", "torch_qlora", "jax_lora", "jax_qlora"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = attrs.fields(CheckpointSpec).checkpoint_every.default
    print(f"torch {version('torch')}, jax {version('jax')}, {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        torch.manual_seed(0)
        config = GPT2Config(n_layer=arguments.layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        GPT2LMHeadModel(config).save_pretrained(home / "model")
        for kernel in arguments.kernels:
            _measure(home, kernel, arguments.rounds, arguments.steps, every)


def _measure(home: Path, kernel: str, rounds: int, steps: int, every: int) -> None:
    contract = FineTuneContract.from_fields(
        trains=False, model=str(home / "model"), backend=kernel, tokenizer="lab", dtype="float32"
    )
    plan, backend = resolve(contract, trains=False)
    rows = _rows()
    session = backend.open(plan, Batching(batch_size=len(rows), grad_accum=1, seed=0).shape(rows, 1))
    session = backend.restore(session, initial_state(backend.state(session).adapter, 0))
    window = [pack(rows)]

    def stepped() -> None:
        for _ in range(steps):
            float(backend.step(session, window, 1e-4).loss_sum)

    stepped()
    longer, plain, blocked, size = [], [], [], 0
    with Telemetry(home / f"{kernel}.jsonl", []) as telemetry, Saver(home / kernel, 2, telemetry, []) as saver:
        for turn in range(2 * rounds):
            started, alone = time.process_time(), time.thread_time()
            if turn % 2:
                saver.save(_checkpoint(backend.state(session), home), None)
                blocked.append(time.thread_time() - alone)
            stepped()
            saver.finish()
            (longer if turn % 2 else plain).append(time.process_time() - started)
            size = sum(path.stat().st_size for path in (home / kernel).rglob("*") if path.is_file())
    step = statistics.median(plain) / steps
    extra = [one - other for one, other in zip(longer, plain, strict=True)]
    shares = sorted(100 * seconds / (every * step) for seconds in extra)
    print(
        f"{kernel}: {statistics.median(shares):.3f} % [{shares[0]:.3f}, {shares[-1]:.3f}] of {every} steps of "
        f"{step:.3f} s; the loop's own part {1000 * statistics.median(blocked):.1f} ms, {size / 2**21:.1f} MiB",
        flush=True,
    )


def _checkpoint(state: Any, home: Path) -> Checkpoint:
    progress = Progress(losses=[1.0] * state.step, step_seconds=[1.0] * state.step)
    return Checkpoint(path=home, state=state, record={"epoch": 0}, curve=progress.curve())


def _rows() -> TokenRows:
    random = np.random.Generator(np.random.Philox(key=0))
    return TokenRows.of(
        [TokenRow(random.integers(0, 50257, n, dtype=np.int32), np.arange(n) >= n * (1 - SUPERVISED)) for n in LENGTHS]
    )


if __name__ == "__main__":
    main()
