"""Sign-off S2: NF4 gives what it gave when it was pinned, and telemetry says ``candle_compat_mode``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mens_core.acceptance.checks import read_telemetry
from mens_core.backend import Backend
from mens_core.exchange import NF4Spec
from mens_core.testing.acceptance import golden
from mens_core.testing.acceptance.materials import ramp

# Losses against those that were pinned on another machine, relative. The NF4 base is the same to the bit; each matrix
# product may be summed in another order, 1e-7 a step. Torch and JAX, which sum differently, are 1e-6 apart here.
LOSSES = 1e-4


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    """The golden file."""
    content: dict[str, Any] = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))
    return content


def test_nf4_has_the_pinned_bytes(backend: Backend, pinned: dict[str, Any]) -> None:
    assert golden.nf4_hashes(backend) == pinned["nf4"]
    # The twin: another block size has other bytes.
    (weight,) = ramp(0.11, 0.037, (13, 8))
    other = backend.quantize(weight, NF4Spec(block_size=16, double_quant=False))
    assert golden.sha256(other.codes) != pinned["nf4"]["ramp in blocks of 8"]["codes"]


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_qlora_run_has_the_pinned_losses_and_says_candle_compat_mode(
    tmp_path: Path, pinned: dict[str, Any], record_property: Any, name: str
) -> None:
    losses = np.array(golden.qlora_losses(name, tmp_path))
    expected = np.array(pinned["losses"])
    record_property("largest relative difference", float(np.abs(losses / expected - 1).max()))
    np.testing.assert_allclose(losses, expected, rtol=LOSSES)
    start = next(event["payload"] for event in read_telemetry(tmp_path / "run") if event["event"] == "train_start")
    assert start["candle_compat_mode"] is True
    assert start["runbook_kernel"] == "candle_qlora"


def test_another_base_than_the_pinned_one_has_other_losses(tmp_path: Path, pinned: dict[str, Any]) -> None:
    """The twin: scales of blocks twice as long."""
    losses = np.array(golden.qlora_losses("torch", tmp_path, block_size=128))
    assert np.abs(losses / np.array(pinned["losses"]) - 1).max() > LOSSES
