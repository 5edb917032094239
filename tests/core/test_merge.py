"""Merging: bit for bit what PEFT merges, from every format, and an error for everything that does not fit."""

import itertools
import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from folders import write_file
from peft import PeftModel
from peft_adapters import peft_adapter
from transformers import AutoModelForCausalLM

import mens_core
from mens_core.artifacts import tensors
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.lora import LoraPair, combined
from mens_core.artifacts.tensors import open_tensors, read_tensors, write_tensors
from mens_core.cli import main
from mens_core.errors import MensError, ModelError
from mens_core.merging import numbers
from mens_core.testing.acceptance.materials import merge_fixture


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family → model folder."""
    root = tmp_path_factory.mktemp("bases")
    for number, (family, config) in enumerate(tiny.CONFIGS.items()):
        tiny.write_model(root / family, family, config, seed=number)
    return {family: root / family for family in tiny.CONFIGS}


def merged_by_peft(base, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


def merge(folder, base, output, **options):
    return mens_core.merge([(folder, 1.0)], base=base, output=output, backend="torch", **options)


SETTINGS = {
    "all": {},
    "rank-stabilised": {"use_rslora": True},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
    "ranks of their own": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.down_proj": 6},
        "alpha_pattern": {"q_proj": 7},
    },
    "a head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a scale below one": {"lora_alpha": 1},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_merge_gives_the_bits_of_peft(bases, tmp_path, settings):
    base = bases["llama"]
    adapter = peft_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    merge(adapter, base, tmp_path / "out")
    expected, found = merged_by_peft(base, adapter), open_tensors(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_gives_the_bits_of_peft_in_half_formats(bases, tmp_path, family, dtype):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases[family], dtype=dtype).save_pretrained(base)
    adapter = peft_adapter(base, tmp_path / "adapter")
    report = merge(adapter, base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    for name, tensor in merged_by_peft(base, adapter, dtype).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert 0 < report["totals"]["relative_rounding"] < 1e-2


@pytest.mark.parametrize("block", [1, 100, 1 << 19])
def test_merge_gives_the_same_bytes_whatever_the_processors(bases, tmp_path, monkeypatch, block):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    threads, reports = torch.get_num_threads(), []
    monkeypatch.setattr(numbers, "_BLOCK", block)
    for processors in (1, 2):
        monkeypatch.setattr(tensors, "processors", lambda processors=processors: processors)
        output = tmp_path / f"on {processors}"
        reports.append(merge(adapter, bases["llama"], output, dtype="bfloat16"))
    one, two = (tmp_path / f"on {processors}" / "model.safetensors" for processors in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert reports[0]["tensors"] == reports[1]["tensors"]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(1, 1), (1, 4095), (3, 1366), (5, 4096)])
def test_merge_errors_are_the_norms_of_the_whole_tensor(shape, monkeypatch):
    monkeypatch.setattr(numbers, "_BLOCK", 2 * shape[1])
    draw, error = np.random.default_rng(0), numbers.TensorError()
    base, b, a = (draw.standard_normal(size, np.float32) for size in (shape, (shape[0], 1), (1, shape[1])))
    by_numpy = SimpleNamespace(merge=lambda base, a, b, scale: base + np.float32(scale) * (b @ a))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    pair = LoraPair(a=a, b=b, scale=0.01)
    written = np.concatenate([block() for block in numbers.merged_blocks(base, pair, bf16, by_numpy, error)])
    rounding = written.astype(np.float32) - by_numpy.merge(base, a, b, 0.01)
    # Half of what a sum of 4096 squares in float32 can lose at most, since a norm is its root.
    bound = 2048 * 2**-24
    for found, expected in ((error.base, base), (error.rounding, rounding)):
        assert found == pytest.approx(np.linalg.norm(expected.astype(np.float64)), rel=bound)
        assert found != pytest.approx(np.linalg.norm(expected[:, 64:].astype(np.float64)), rel=bound)
    assert error.elements == base.size
    assert error.changed == np.count_nonzero(written != base.astype(bf16))


@pytest.fixture
def subset(tmp_path):
    """The runbook's fixture of row 10, whose own tests lie in the package."""

    def adapter(number, name, spelling, **changes):
        return merge_fixture(tmp_path, number, name, spelling, changes)[1][2:]

    return merge_fixture(tmp_path, 3, "vox_mens_adapter")[0], adapter


SHAPES = ((2, 3), (4, 2))


def merge_words(tmp_path, words, verb="merge-qlora"):
    output = ["--output", tmp_path / "merged.safetensors", "--backend", "torch"]
    return main([verb, *map(str, ["--base-shard", tmp_path / "base.safetensors", *words, *output])])


BROKEN_META = {
    "version 1": ({"format": "vox_mens_qlora_lora_only_v1", "version": 1}, "is not known"),
    "version 4": ({"version": 4}, "is not known"),
    "another format": ({"format": "junk"}, "'junk'"),
    "no entry for a layer": ({"base_key_map": {"head": "wte.weight"}}, "no entry for lm_head"),
    "two layers on one tensor": (
        {"layer_order": ["lm_head", "mid0"], "base_key_map": {"lm_head": "wte.weight", "mid0": "wte.weight"}},
        "both update wte.weight",
    ),
    "a tensor that is not there": ({"base_key_map": {"lm_head": "wpe.weight"}}, "no counterpart in the base"),
    "another rank": ({"rank": 3}, "as its description says"),
    "no rank": ({"rank": 0}, "rank is 0"),
    "no alpha": ({"alpha": "4"}, "alpha is '4'"),
    "a layer without tensors": (
        {"layer_order": ["lm_head", "l0"], "base_key_map": {"lm_head": "wte.weight", "l0": "h.0.mlp.c_fc.weight"}},
        "no pair of tensors for l0",
    ),
}


@pytest.mark.parametrize("case", BROKEN_META)
def test_merge_qlora_refuses_a_description_that_is_wrong(tmp_path, subset, capsys, case):
    _, adapter = subset
    changes, message = BROKEN_META[case]
    assert merge_words(tmp_path, adapter(3, "vox_mens_adapter", "", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


def test_merge_of_layers_of_two_kinds_of_model_is_refused(tmp_path, subset, capsys):
    _, adapter = subset
    keys = {"lm_head": "wte.weight", "l0": "model.layers.0.mlp.up_proj.weight"}
    words = adapter(3, "vox_mens_adapter", "", layer_order=[*keys], base_key_map=keys)
    tensors = {f"{name}.lora_{half}": np.ones(shape) for name in keys for half, shape in zip("ab", SHAPES, strict=True)}
    write_tensors(tmp_path / "adapter.safetensors", tensors, {})
    assert merge_words(tmp_path, words) == 2
    assert "mixes tensors of different kinds" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (3, 4), (2, 4, 3)])
def test_merge_broadcasts_nothing(tmp_path, subset, capsys, shape):
    _, adapter = subset
    words = adapter(3, "vox_mens_adapter", "")
    write_tensors(tmp_path / "base.safetensors", {"wte.weight": np.ones(shape, np.float32)}, {})
    assert merge_words(tmp_path, words) == 2
    assert "nothing is broadcast" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["base.safetensors", "adapter.safetensors", "meta.json"])
def test_merge_names_a_file_that_is_missing(tmp_path, subset, capsys, missing):
    _, adapter = subset
    words = adapter(2, "vox_mens_qlora_lora_only_v2", "")
    (tmp_path / missing).unlink()
    assert merge_words(tmp_path, words) == 2
    assert missing in capsys.readouterr().err


def test_merge_weights_points_to_merge_qlora_and_the_other_way_round(tmp_path, subset, capsys):
    _, adapter = subset
    assert merge_words(tmp_path, adapter(3, "vox_mens_adapter", ""), "merge-weights") == 2
    assert "python -m mens_core merge-qlora" in capsys.readouterr().err
    assert merge_words(tmp_path, adapter(3, "vox_mens_adapter", "", adapter_method="lora")) == 2
    assert "python -m mens_core merge-weights" in capsys.readouterr().err


def _without(name):
    def change(folder):
        tensors = dict(read_tensors(folder / "adapter_model.safetensors"))
        tensors = {key: np.array(tensor) for key, tensor in tensors.items() if name not in key}
        write_tensors(folder / "adapter_model.safetensors", tensors, {})

    return change


def _with(**entries):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def _with_tensor(name, array):
    def change(folder):
        tensors = {key: np.array(tensor) for key, tensor in read_tensors(folder / "adapter_model.safetensors").items()}
        write_tensors(folder / "adapter_model.safetensors", tensors | {name: array}, {})

    return change


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN_PEFT = {
    "half a pair": (_without("layers.0.self_attn.q_proj.lora_B"), "half of an update is missing"),
    "a layer missing": (_without("layers.1.self_attn.q_proj"), "the adapter is not complete"),
    "a module missing": (_without("self_attn.k_proj"), "the adapter is not complete"),
    "another rank": (_with(r=8), "has rank 4, its configuration says 8"),
    "DoRA": (_with(use_dora=True), "more than LoRA: use_dora = True"),
    "a bias": (_with(bias="all"), "more than LoRA"),
    "another kind": (_with(peft_type="IA3"), "does not describe a LoRA adapter"),
    "no alpha": (_with(lora_alpha=0), "lora_alpha is 0"),
    "a stranger": (_with_tensor("base_model.model.model.norm.weight", np.ones(24, np.float32)), "no part of a LoRA"),
    "not finite": (_with_tensor(Q0, np.full((4, 24), np.nan, np.float32)), "not finite"),
    "of another width": (_with_tensor(Q0, np.ones((4, 25), np.float32)), "nothing is broadcast"),
    "no update": (_with(target_modules=["lm_head"]), "names lm_head and holds nothing"),
}


@pytest.mark.parametrize("case", BROKEN_PEFT)
def test_merge_refuses_an_adapter_that_does_not_fit_and_leaves_nothing(bases, tmp_path, case):
    change, message = BROKEN_PEFT[case]
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    change(adapter)
    with pytest.raises(ModelError, match=message):
        merge(adapter, bases["llama"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_refuses_an_adapter_of_another_model(bases, tmp_path):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    for other in ("gpt2", "qwen3"):
        with pytest.raises(ModelError, match=r"no counterpart|nothing is broadcast"):
            merge(adapter, bases[other], tmp_path / "out")


def test_merge_that_changes_nothing_is_refused(bases, tmp_path):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter", init_lora_weights=True)
    with pytest.raises(ModelError, match="next to nothing"):
        merge(adapter, bases["llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_onto_another_base_than_that_of_the_training_is_refused(bases, tmp_path):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    contract = {"method": "lora", "block_size": 64, "double_quant": True}
    record = {
        "provenance_license_class": "mit",
        "plan": {"contract": contract},
        "sha256": {"base_shards": {"model.safetensors": "0" * 64}},
    }
    (adapter / "training_manifest.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="not the one that the adapter was trained on"):
        merge(adapter, bases["llama"], tmp_path / "out")
    report = merge(adapter, bases["llama"], tmp_path / "out", base_changed_anyway=True)
    assert report["notes"] == ["model.safetensors is not what the adapter was trained on"]
    assert "\nlicense: mit\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("revision", ["v1.0", None])
def test_merge_takes_the_commit_of_the_base_that_the_adapter_names(bases, tmp_path, monkeypatch, revision):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    _with(base_model_name_or_path="owner/name", revision=revision)(adapter)
    asked = []

    def found(model, commit):
        asked.append((model, commit))
        return model, bases["llama"]

    monkeypatch.setattr("mens_core.merging.merge.find_model", found)
    merge(adapter, None, tmp_path / "out")
    merge(adapter, bases["llama"], tmp_path / "given")
    assert asked == [("owner/name", revision), (str(bases["llama"]), None)]


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_merge_unties_a_tied_head_that_is_updated_and_leaves_the_table_alone(bases, tmp_path, family):
    base = bases[family]
    stored = next(tensor for name, tensor in open_tensors(base).items() if "wte" in name or "embed_tokens" in name)
    vocab, width = stored.shape
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, width), (vocab, 2)))
    write_tensors(tmp_path / "adapter.safetensors", {"lm_head.lora_a": a, "lm_head.lora_b": b}, {})
    key = "wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    meta = {"format": "vox_mens_adapter", "version": 3, "layer_order": ["lm_head"], "base_key_map": {"lm_head": key}}
    meta |= {"rank": 2, "alpha": 4, "adapter_method": "lora"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    report = merge(tmp_path / "adapter.safetensors", base, tmp_path / "out", meta=tmp_path / "meta.json")
    assert report["head_untied"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), stored)
    np.testing.assert_allclose(model.get_output_embeddings().weight.detach().numpy(), stored + 2 * b @ a, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("whole", ["head", "table", "both"])
def test_a_tied_head_and_its_table_part_where_one_is_trained_whole(bases, tmp_path, family, whole):
    base = bases[family]
    table, linear = ("wte", "c_fc") if family == "gpt2" else ("embed_tokens", "up_proj")
    saved = {"head": ["lm_head"], "table": [table], "both": [table, "lm_head"]}[whole]
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=[linear], modules_to_save=saved)
    assert merge(adapter, base, tmp_path / "out")["head_untied"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), torch.arange(20)[None]
    assert not merged.config.tie_word_embeddings
    with torch.no_grad():
        expected, found = model(ids).logits, merged(ids).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        # With the two tied it is another model.
        merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
        assert (merged(ids).logits - expected).abs().max() > 0.01 * expected.abs().max()


def test_merge_in_shards_opens_as_one_file_does(bases, tmp_path):
    adapter = peft_adapter(bases["qwen3"], tmp_path / "adapter")
    one = merge(adapter, bases["qwen3"], tmp_path / "one")
    many = merge(adapter, bases["qwen3"], tmp_path / "many", max_shard_bytes=20_000)
    assert one["files"] == ["model.safetensors"]
    assert len(many["files"]) > 3
    assert all((tmp_path / "many" / file).stat().st_size < 30_000 for file in many["files"][1:-1])
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_merge_in_another_format_rounds_every_tensor_and_says_so(bases, tmp_path):
    adapter = peft_adapter(bases["qwen3"], tmp_path / "adapter")
    merge(adapter, bases["qwen3"], tmp_path / "exact")
    merge(adapter, bases["qwen3"], tmp_path / "out", dtype="bfloat16")
    exact, found = open_tensors(tmp_path / "exact"), open_tensors(tmp_path / "out")
    for name, tensor in exact.items():
        np.testing.assert_array_equal(found[name], tensor.astype(ml_dtypes.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_merge_of_several_adapters_is_their_weighted_sum(bases, tmp_path):
    base = bases["llama"]
    parts = [
        (peft_adapter(base, tmp_path / "one", r=4), 0.75),
        (peft_adapter(base, tmp_path / "two", r=2, use_rslora=True, target_modules=["q_proj"]), -0.25),
    ]
    mens_core.merge(parts, base=base, output=tmp_path / "out", backend="torch")
    merged = open_tensors(tmp_path / "out")
    expected = {name: tensor.astype(np.float64) for name, tensor in open_tensors(base).items()}
    for folder, weight in parts:
        for name, pair in open_adapter(folder).pairs.items():
            expected[name] += weight * pair.scale * pair.b.astype(np.float64) @ pair.a
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=3e-6)
    pair = combined([(open_adapter(folder), weight) for folder, weight in parts]).pairs
    assert {pair[name].rank for name in pair} == {4, 6}


def test_a_merge_that_is_interrupted_leaves_nothing(bases, tmp_path, monkeypatch):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    calls = itertools.count()

    def interrupted(*_):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return np.ones((1, 1), np.float32)

    monkeypatch.setattr("mens_core.backend.Backend.merge", lambda _, weight, *__: interrupted() * weight)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, bases["llama"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_into_a_folder_in_use_is_refused(bases, tmp_path):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    write_file(tmp_path / "out" / "model.safetensors", {"a": ("F32", (1,))})
    with pytest.raises(ModelError, match="not empty"):
        merge(adapter, bases["llama"], tmp_path / "out")


def test_a_truncated_adapter_is_refused(bases, tmp_path):
    adapter = peft_adapter(bases["llama"], tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(MensError, match="malformed"):
        merge(adapter, bases["llama"], tmp_path / "out")
