"""An adapter on disk is the adapter that was trained, and a merged model is the base with it."""

import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from peft import PeftModel

import mens_core
from mens_core.artifacts.adapter import write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.tensors import open_tensors
from mens_core.exchange import TrainingState

# The scale is alpha / √rank for these families and alpha / rank for the others.
RANK_STABILISED = ("llama", "qwen3")
BATCH = tiny.batch_of(9, 5, 12)


@pytest.fixture
def written(backend, adapted, folders, tmp_path):
    """A session with a random adapter, the folder of a base and that of the adapter on disk."""

    def write(family, **fields):
        session, adapter = adapted(family, **fields)
        folder = tmp_path / "adapter"
        folder.mkdir()
        write_adapter(folder, adapter, tiny.plan_for(backend, folders[family], **fields))
        return session, folders[family], folder

    return write


def _session_on(backend, base, **fields):
    return backend.open(tiny.plan_for(backend, base, **fields), tiny.SHAPE)


def test_lora_checkpoint_roundtrip_keeps_every_bit_of_the_logits(backend, written, family):
    rslora = family in RANK_STABILISED
    session, _, folder = written(family, rslora=rslora)
    before = backend.forward(session, BATCH)
    read = open_adapter(folder)
    tensors = read.tensors()
    fresh = TrainingState(adapter={name: np.zeros_like(array) for name, array in tensors.items()}, optimizer={}, step=0)
    assert np.abs(backend.forward(backend.restore(session, fresh), BATCH) - before).max() > tolerances.LOGITS
    back = backend.restore(session, TrainingState(adapter=tensors, optimizer={}, step=0))
    np.testing.assert_array_equal(backend.forward(back, BATCH), before)
    assert read.usual() == (4, 8 / (4**0.5 if rslora else 4))


def test_peft_opens_the_adapter_and_gives_the_same_logits(backend, written, family):
    session, base, folder = written(family, rslora=family in RANK_STABILISED)
    model = PeftModel.from_pretrained(references.open_model(base), folder).eval()
    with torch.no_grad():
        expected = references.logits_of(model, BATCH).numpy()
    assert np.abs(backend.forward(session, BATCH) - expected).max() <= tolerances.LOGITS


def test_merged_matches_lora_full_forward(backend, written, family, tmp_path):
    session, base, folder = written(family)
    mens_core.merge([(folder, 1.0)], base=base, output=tmp_path / "merged", backend=backend.name)
    merged = backend.forward(_session_on(backend, tmp_path / "merged"), BATCH)
    assert np.abs(merged - backend.forward(session, BATCH)).max() <= tolerances.LOGITS
    state = backend.state(session)
    twin = {name: array * np.float32(1.005) for name, array in state.adapter.items()}
    session = backend.restore(session, TrainingState(adapter=twin, optimizer={}, step=0))
    assert np.abs(merged - backend.forward(session, BATCH)).max() > tolerances.LOGITS


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_merged_matches_lora_full_forward_of_a_quantised_base_when_merged_onto_it(backend, written, family, tmp_path):
    session, base, folder = written(family, method="qlora")
    logits = {}
    for quantized in (True, False):
        output = tmp_path / f"merged-{quantized}"
        mens_core.merge([(folder, 1.0)], base=base, output=output, quantized=quantized, backend=backend.name)
        logits[quantized] = backend.forward(_session_on(backend, output), BATCH)
    adapted = backend.forward(session, BATCH)
    assert np.abs(logits[True] - adapted).max() <= tolerances.LOGITS
    assert np.abs(logits[False] - adapted).max() > tolerances.LOGITS


def test_merged_back_by_the_opposite_is_the_base_up_to_two_roundings(backend, written, tmp_path):
    _, base, folder = written("llama")
    there, back = tmp_path / "there", tmp_path / "back"
    mens_core.merge([(folder, 1.0)], base=base, output=there, backend=backend.name)
    mens_core.merge([(folder, -1.0)], base=there, output=back, backend=backend.name)
    merged, expected, found = open_tensors(there), open_tensors(base), open_tensors(back)
    for name, tensor in expected.items():
        # Each sum is rounded to half a unit of the larger of its two results.
        bound = np.finfo(np.float32).eps * (np.abs(merged[name]) + np.abs(tensor)).max()
        assert np.abs(found[name] - tensor).max() <= bound
