"""What sign-off S2 pins: the bytes of NF4, and the losses of a short QLoRA run.

``python scripts/record_nf4_golden.py`` records them anew, with machine and versions, from a clean tree alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mens_core import Planner
from mens_core.backend import Backend
from mens_core.exchange import NF4Spec
from mens_core.random_model import write_random_weights
from mens_core.testing.acceptance.materials import TINY, ramp, write_rows

__all__ = ["GOLDEN", "nf4_hashes", "qlora_losses", "sha256"]

#: The file that holds them.
GOLDEN = Path(__file__).with_name("golden_nf4.json")

_SPECS = {
    "ramp in blocks of 8": NF4Spec(block_size=8, double_quant=False),
    "normal in blocks of 64": NF4Spec(block_size=64, double_quant=False),
    "normal in blocks of 64, scales in 8 bits": NF4Spec(block_size=64, double_quant=True),
}


def nf4_hashes(backend: Backend) -> dict[str, dict[str, str]]:
    """Sha256 of every array of three stored weights, and of the numbers they give back."""
    (weight,) = ramp(0.11, 0.037, (13, 8))
    # 65 536 numbers and some: several blocks of 256 scales, and a last one that is not full.
    normal = np.random.Generator(np.random.Philox(key=7)).standard_normal((301, 220), np.float32)
    found = {}
    for name, spec in _SPECS.items():
        stored = backend.quantize(weight if name.startswith("ramp") else normal, spec)
        arrays = {field: getattr(stored, field) for field in ("codes", "absmax", "nested_absmax", "offset")}
        arrays["numbers"] = backend.dequantize(stored)
        found[name] = {field: sha256(array) for field, array in arrays.items() if array is not None}
    return found


def sha256(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def qlora_losses(backend: str, folder: Path, **changes: Any) -> list[float]:
    """The losses of eight QLoRA steps of a tiny Qwen3-shaped model with the lab's tokenizer.

    Args:
        backend: name.
        folder: exists and is empty; model, rows and run come to lie in it.
        **changes: fields of the contract that differ.
    """
    (folder / "model").mkdir()
    write_random_weights(folder / "model", arch="qwen3", size=TINY, vocab_size=320, seed=3, like_trained=True)
    rows = [{"prompt": f"{number} plus {number}?", "response": str(2 * number)} for number in range(24)]
    write_rows(folder / "data" / "train.jsonl", rows)
    fields: dict[str, Any] = {"model": str(folder / "model"), "tokenizer": "lab", "data_dir": folder / "data"}
    fields |= {"output_dir": folder / "run", "backend": f"{backend}_qlora", "device": "cpu", "dtype": "float32"}
    fields |= {"max_steps": 8, "batch_size": 6, "grad_accum": 1, "epochs": 2, "learning_rate": 2e-3}
    fields |= {"warmup_steps": 0, "seq_len": 256}
    result = Planner().run(**fields | changes)
    assert result.manifest["candle_compat_mode"] is True
    return list(result.losses)
