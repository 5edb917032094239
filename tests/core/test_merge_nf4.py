"""Merging into NF4: transformers opens the folder as it is, and holds what the backend stores."""

import json

import numpy as np
import pytest
import tiny
import tolerances
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft_adapters import peft_adapter
from transformers import AutoModelForCausalLM

import mens_core
from mens_core.artifacts.tensors import open_tensors
from mens_core.cli import main
from mens_core.errors import MensError, ModelError
from mens_core.exchange import NF4Spec
from mens_core.plugins import load_backend

# Rows of whole blocks: bitsandbytes' own CPU kernel takes the scales of other rows from the wrong places.
_WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS = {"gpt2": {"n_embd": 64, "n_head": 4}, "qwen3": _WIDE | {"head_dim": 32}}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Family → its base and an adapter on all its linear layers."""
    root = tmp_path_factory.mktemp("adapted")
    folders = {}
    for number, (family, config) in enumerate(tiny.CONFIGS.items()):
        base, adapter = root / family, root / f"{family}-adapter"
        tiny.write_model(base, family, config | WIDTHS.get(family, _WIDE), seed=number)
        peft_adapter(base, adapter)
        folders[family] = base, adapter
    return folders


def merge(base, adapter, output, **options):
    return mens_core.merge([(adapter, 1.0)], base=base, output=output, **{"backend": "torch"} | options)


def dense_and_stored(adapted, family, tmp_path, **options):
    base, adapter = adapted[family]
    merge(base, adapter, tmp_path / "dense", dtype="float32")
    report = merge(base, adapter, tmp_path / "nf4", dtype="float32", quantize="nf4", **options)
    return open_tensors(tmp_path / "dense"), AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), report


def brought_back(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).numpy()


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_transformers_holds_the_bits_that_the_backend_stores(adapted, tmp_path, family, backend):
    dense, model, report = dense_and_stored(adapted, family, tmp_path, backend=backend)
    other = load_backend(backend)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert set(report["tensors"]) == {f"{name}.weight" for name in layers}
    lost = total = 0.0
    for name, layer in layers.items():
        merged = np.ascontiguousarray(dense[f"{name}.weight"].T if family == "gpt2" else dense[f"{name}.weight"])
        expected = other.dequantize(other.quantize(merged, NF4Spec()))
        np.testing.assert_array_equal(brought_back(layer).view(np.uint32), expected.view(np.uint32), err_msg=name)
        lost += float(np.square(expected - merged).sum())
        total += report["tensors"][f"{name}.weight"]["update"] ** 2
    assert report["totals"]["relative_rounding"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    state = model.state_dict()
    others = [name for name in dense if name.removesuffix(".weight") not in layers]
    assert len(others) > 4
    for name in others:
        np.testing.assert_array_equal(state[name].numpy(), dense[name], err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_checkpoint_in_nf4_answers_as_its_dense_twin_does(adapted, tmp_path, family):
    """The same model with the dequantised weights in dense layers; never stored in NF4, it is far away."""
    _, model, _ = dense_and_stored(adapted, family, tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = torch.arange(3, 40)[None]
    # Before the first product: on some CPUs bitsandbytes then packs its layers anew.
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    weights = {name: torch.tensor(brought_back(layer)) for name, layer in layers.items()}
    with torch.no_grad():
        found, plain = model(tokens).logits, twin(tokens).logits
        for name, weight in weights.items():
            twin.get_submodule(name).weight.copy_(weight.T if family == "gpt2" else weight)
        expected = twin(tokens).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < tolerances.NF4_PRODUCT * scale
    assert float((plain - expected).abs().max()) > 5 * tolerances.NF4_PRODUCT * scale


def test_a_checkpoint_in_nf4_has_a_quarter_of_the_size_and_opens_from_shards(adapted, tmp_path):
    base, adapter = adapted["llama"]
    whole = merge(base, adapter, tmp_path / "whole", quantize="nf4")
    many = merge(base, adapter, tmp_path / "many", quantize="nf4", max_shard_bytes=3000)
    assert len(whole["files"]) == 1
    assert len(many["files"]) > 5
    assert sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name.startswith(".")) == []
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "many")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rows_that_are_no_whole_blocks_are_stored_and_the_report_says_who_misreads_them(tmp_path):
    tiny.write_model(tmp_path / "base", "llama", tiny.CONFIGS["llama"])
    peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "nf4", quantize="nf4")
    assert any("rows of 48, 50" in note and "CPU" in note for note in report["notes"])


def test_half_formats_are_kept_and_multiplied_in(adapted, tmp_path):
    base, adapter = adapted["qwen2"]
    merge(base, adapter, tmp_path / "nf4", quantize="nf4", dtype="bfloat16")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    layer = next(layer for layer in model.modules() if isinstance(layer, Linear4bit))
    assert layer.weight.quant_state.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_an_update_too_small_for_any_code_is_refused(adapted, tmp_path):
    base, adapter = adapted["llama"]
    with pytest.raises(ModelError, match="next to nothing"):
        mens_core.merge([(adapter, 1e-8)], base=base, output=tmp_path / "out", backend="torch", quantize="nf4")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_in_nf4_is_refused(adapted, tmp_path):
    base, adapter = adapted["llama"]
    with pytest.raises(MensError, match="there is no storage 'int3'"):
        merge(base, adapter, tmp_path / "out", quantize="int3")
    with pytest.raises(MensError, match="single tensors are written in float32"):
        merge(base, adapter, tmp_path / "out", quantize="nf4", subset=True)


def test_the_command_writes_nf4_and_says_that_nothing_was_run(adapted, tmp_path, capsys):
    base, adapter = adapted["llama"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    words = ["--adapter", adapter, "--base", base, "--output", tmp_path / "out", "--held-out", tmp_path / "rows.jsonl"]
    assert main(["merge-adapter", *map(str, words), "--backend", "torch", "--quantize", "nf4"]) == 0
    assert "open no checkpoint that is in NF4" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["quantize"] == {"block_size": 64, "double_quant": True, "codebook": "nf4"}
    assert 0 < report["totals"]["changed"] < report["totals"]["elements"]
