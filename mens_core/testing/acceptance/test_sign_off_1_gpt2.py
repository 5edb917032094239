"""Sign-off S1: a GPT-2 config with a Hugging Face tokenizer and ``--backend lora``: planned, loaded whole, equal."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mens_core import Planner
from mens_core.artifacts.adapter import initial_state
from mens_core.cli import main
from mens_core.contract import FineTuneContract
from mens_core.exchange import IGNORE, Batch
from mens_core.planner import resolve
from mens_core.testing import tiny
from mens_core.testing.conformance.tolerances import LOGITS


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_gpt2_with_a_hugging_face_tokenizer_is_planned_loaded_and_equal(
    corpus: Path,
    trainable: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Any,
    backend: str,
) -> None:
    base = trainable("gpt2")
    words = ["--model", str(base), "--data-dir", str(corpus), "--output-dir", str(tmp_path / "run"), "--seq-len", "320"]
    assert main(["plan", "--backend", "lora", "--tokenizer", "hf", "--json", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["runbook_kernel"], planned["model_type"]) == ("burn_lora", "gpt2")
    # Every tensor that the graph asks for is in the file, of its shape, and none is left over.
    held = {check["code"]: check["passed"] for check in planned["preflight"]}
    assert all(held.values())
    assert {"tensors_present", "tensors_known", "tensor_shapes"} <= set(held)

    transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = transformers.AutoTokenizer.from_pretrained(base)("def mean(data):\n    return sum(data) / len(data)")[
        "input_ids"
    ]
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0].numpy()

    fields = {"model": str(base), "backend": f"{backend}_lora", "device": "cpu", "dtype": "float32"}
    plan, opened = resolve(FineTuneContract.from_fields(trains=False, **fields), trains=False)
    session = opened.open(plan, tiny.SHAPE)
    session = opened.restore(session, initial_state(opened.state(session).adapter, seed=0))
    tokens = np.array(ids, np.int32)
    row = Batch(
        input_ids=tokens,
        positions=np.arange(len(ids), dtype=np.int32),
        targets=np.full_like(tokens, IGNORE),
        row_lengths=np.array([len(ids)], np.int32),
    )
    found = opened.forward(session, row)
    record_property("largest difference of logits", float(np.abs(found - expected).max()))
    record_property("largest logit", float(np.abs(expected).max()))
    assert np.abs(found - expected).max() <= LOGITS
    # The twin: one token exchanged is further away than any tolerance.
    assert np.abs(found[1:] - expected[:-1]).max() > 1000 * LOGITS

    result = Planner().run(
        model=str(base),
        data_dir=corpus,
        output_dir=tmp_path / "run",
        backend=f"{backend}_lora",
        max_steps=2,
        batch_size=2,
        seq_len=320,
    )
    assert result.manifest["status"] == "complete"
