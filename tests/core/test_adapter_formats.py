"""Adapters written in other formats: the same numbers in all of them, and a refusal by name of what one cannot say."""

import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mens_core import convert_adapter, describe_adapter
from mens_core.artifacts.adapters import open_adapter, weights_of
from mens_core.artifacts.tensors import read_tensors, write_tensors
from mens_core.cli import main
from mens_core.errors import ModelError

MODULES = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"),
}
FORMATS = ("peft", "v2", "v3", "mlx")


def write_peft(folder, modules=MODULES["llama"], rank=4, whole=(), **changes):
    """An adapter in PEFT's format, of random numbers; ``changes`` are of its configuration."""
    folder.mkdir()
    draw = np.random.default_rng(len(modules)).standard_normal
    tensors = {f"base_model.model.{module}.weight": draw((8, 6), np.float32) for module in whole}
    for number, module in enumerate(modules):
        own = changes.get("rank_pattern", {}).get(module, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw((own, 5 + number), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw((7 + number, own), np.float32)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 7, "target_modules": [*modules], "lora_dropout": 0.1}
    config |= {"base_model_name_or_path": "somebody/a-base", "modules_to_save": [*whole] or None}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def same(left, right):
    """Whether two adapters are the same to the last bit."""
    ours, theirs = open_adapter(left).pairs, open_adapter(right).pairs
    return ours.keys() == theirs.keys() and all(
        pair.scale == theirs[name].scale
        and np.array_equal(pair.a, theirs[name].a)
        and np.array_equal(pair.b, theirs[name].b)
        for name, pair in ours.items()
    )


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("back", FORMATS)
def test_there_and_back_gives_the_same_bits(tmp_path, family, there, back):
    start = write_peft(tmp_path / "start", MODULES[family])
    convert_adapter(start, there, tmp_path / "there", method="qlora")
    convert_adapter(tmp_path / "there", back, tmp_path / "back", method="qlora")
    assert same(start, tmp_path / "there")
    assert same(start, tmp_path / "back")
    assert open_adapter(tmp_path / "back").kind == back
    assert [weights_of(tmp_path / "back")] == [*(tmp_path / "back").glob("*.safetensors")]
    assert open_adapter(tmp_path / "back").base_model == "somebody/a-base"


def test_one_changed_number_is_not_the_same(tmp_path):
    start = write_peft(tmp_path / "start")
    convert_adapter(start, "mlx", tmp_path / "out")
    path = tmp_path / "out" / "adapters.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in read_tensors(path).items()}
    tensors["lm_head.lora_a"][0, 0] = np.nextafter(tensors["lm_head.lora_a"][0, 0], np.float32(9))
    write_tensors(path, tensors, {})
    assert not same(start, tmp_path / "out")


@given(alpha=st.integers(1, 1000), rank=st.integers(1, 40))
def test_every_alpha_over_rank_comes_back_from_the_scale(tmp_path_factory, alpha, rank):
    folder = tmp_path_factory.mktemp("alpha")
    start = write_peft(folder / "start", MODULES["gpt2"][:1], rank=rank, lora_alpha=alpha)
    convert_adapter(start, "mlx", folder / "mlx")
    convert_adapter(folder / "mlx", "peft", folder / "back")
    config = json.loads((folder / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    assert same(start, folder / "back")


@given(rank=st.integers(1, 64), alpha=st.floats(0.01, 1000))
def test_a_scale_that_is_no_quotient_is_off_by_one_unit_of_its_last_place_at_most(tmp_path_factory, rank, alpha):
    folder = tmp_path_factory.mktemp("scale")
    start = write_peft(folder / "start", MODULES["gpt2"][:1], rank=rank, lora_alpha=alpha, use_rslora=True)
    convert_adapter(start, "peft", folder / "back")
    (before,), (after,) = (describe_adapter(path)["scales"] for path in (start, folder / "back"))
    assert abs(after - before) <= np.spacing(before)
    assert json.loads((folder / "back" / "adapter_config.json").read_text())["use_rslora"] is False


SETTINGS = {
    "all": ({}, ("peft", "v3", "mlx")),
    "ranks of their own": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp.up_proj": 7}}, ("peft",)),
    "rank-stabilised": ({"use_rslora": True}, ("peft", "v3", "mlx")),
    "a head trained whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ("peft",)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family → model folder."""
    root = tmp_path_factory.mktemp("bases")
    for family in MODULES:
        tiny.write_model(root / family, family, tiny.CONFIGS[family])
    return {family: root / family for family in MODULES}


@pytest.mark.parametrize(("family", "case"), [("gpt2", "all"), *(("llama", case) for case in SETTINGS)])
def test_peft_merges_what_was_converted_as_it_merges_the_original(bases, tmp_path, family, case):
    settings, others = SETTINGS[case]
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"} | settings
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases[family]), LoraConfig(**config, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "start")

    def merged(folder):
        base = AutoModelForCausalLM.from_pretrained(bases[family])
        return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()

    expected = merged(tmp_path / "start")
    for other in others:
        convert_adapter(tmp_path / "start", other, tmp_path / other, method="lora")
        convert_adapter(tmp_path / other, "peft", tmp_path / f"{other}-peft")
        found = merged(tmp_path / f"{other}-peft")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_mlx_computes_from_its_files_what_peft_does(tmp_path):
    start = write_peft(tmp_path / "start", MODULES["gpt2"])
    convert_adapter(start, "mlx", tmp_path / "mlx")
    tensors = read_tensors(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert parameters == {"rank": 4, "scale": 1.75, "dropout": 0.1, "keys": ["attn.c_attn", "mlp.c_fc"]}
    pair = open_adapter(start).pairs["transformer.h.0.attn.c_attn.weight"]
    rows = np.random.default_rng(1).standard_normal((3, 5))
    # LoRALinear.__call__ of mlx-lm, tuner/lora.py
    found = (
        parameters["scale"] * (rows @ tensors["model.h.0.attn.c_attn.lora_a"]) @ tensors["model.h.0.attn.c_attn.lora_b"]
    )
    np.testing.assert_allclose(found, rows @ (pair.scale * pair.b @ pair.a).T, rtol=1e-5, atol=1e-5)


OWN_RANK = {"rank_pattern": {"lm_head": 2}}
OWN_SCALE = {"alpha_pattern": {"lm_head": 3}}
WHOLE = {"modules": MODULES["llama"][:2], "whole": ["lm_head"]}
CANNOT = {
    "a rank of its own in v3": ("v3", "lora", OWN_RANK, "version 3 cannot say a rank or scale.*: lm_head"),
    "a rank of its own in v2": ("v2", "qlora", OWN_RANK, "version 2 cannot say a rank or scale.*: lm_head"),
    "a rank of its own in MLX": ("mlx", None, OWN_RANK, "mlx-lm cannot say a rank or scale.*: lm_head"),
    "a scale of its own in MLX": ("mlx", None, OWN_SCALE, "mlx-lm cannot say a rank or scale.*: lm_head"),
    "a head trained whole in MLX": ("mlx", None, WHOLE, "mlx-lm cannot hold tensors trained whole: lm_head.weight"),
    "a head trained whole in v3": ("v3", "lora", WHOLE, "version 3 cannot hold tensors trained whole: lm_head.weight"),
    "LoRA in v2": ("v2", "lora", {}, "version 2 is of adapters of an NF4 base alone"),
    "no method in v3": ("v3", None, {}, "version 3 says whether the base was quantised"),
    "a strange graph in MLX": ("mlx", None, {"modules": ["trunk.0.dense"]}, "what mlx-lm calls trunk.0.dense"),
    "a table in PEFT": ("peft", None, {"modules": ["model.embed_tokens"]}, "PEFT cannot update a table of tokens"),
    "a format that does not exist": ("gguf", None, {}, "there is no format 'gguf'"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_format_cannot_say_is_refused_by_name_and_nothing_is_written(tmp_path, case):
    to, method, changes, message = CANNOT[case]
    start = write_peft(tmp_path / "start", **changes)
    with pytest.raises(ModelError, match=message):
        convert_adapter(start, to, tmp_path / "out", method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(
    ("nf4", "to", "message"),
    [
        ({"block_size": 128, "double_quant": True}, "v3", "cannot say how the base was quantised.*128"),
        ({"block_size": 64, "double_quant": False}, "v2", "absmax values were not quantised"),
    ],
)
def test_storage_that_a_description_cannot_say_is_refused(tmp_path, nf4, to, message):
    start = write_peft(tmp_path / "start")
    record = {"plan": {"contract": {"method": "qlora", **nf4}}, "vocab_size": 11, "d_model": 5}
    (start / "training_manifest.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=message):
        convert_adapter(start, to, tmp_path / "out")
    with pytest.raises(ModelError, match="trained as qlora, not as lora"):
        convert_adapter(start, "v3", tmp_path / "out", method="lora")


def test_a_runs_description_has_the_sizes_of_its_manifest(tmp_path):
    start = write_peft(tmp_path / "start")
    contract = {"method": "qlora", "block_size": 64, "double_quant": False}
    record = {"plan": {"contract": contract}, "vocab_size": 11, "d_model": 5}
    (start / "training_manifest.json").write_text(json.dumps(record))
    done = convert_adapter(start, "v3", tmp_path / "v3")
    meta = json.loads((tmp_path / "v3" / "populi_adapter_manifest_v3.json").read_text())
    assert (meta["vocab"], meta["d_model"], meta["rank"], meta["alpha"]) == (11, 5, 4, 7)
    assert meta["quant"] == {"base_quant": "nf4", "double_quant": False}
    assert done["notes"] == ["version 3 does not say that the input had a dropout of 0.1"]
    assert convert_adapter(start, "mlx", tmp_path / "mlx")["notes"] == [
        "the new files do not say that the base was quantised to NF4"
    ]


def test_names_of_a_description_outlive_the_conversion_of_its_version(tmp_path):
    keys = {"mid": "h.0.attn.c_attn.weight", "head": "lm_head.weight"}
    tensors = {f"{name}.lora_a": np.ones((2, 3), np.float32) for name in keys}
    tensors |= {f"{name}.lora_b": np.ones((4, 2), np.float32) for name in keys}
    write_tensors(tmp_path / "adapter.safetensors", tensors, {})
    meta = {"format": "vox_mens_qlora_lora_only_v2", "version": 2, "layer_order": [*keys], "base_key_map": keys}
    meta |= {"rank": 2, "alpha": 4, "vocab": 4, "d_model": 3, "embed_key": "wte.weight"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    source = {"path": tmp_path / "adapter.safetensors", "meta": tmp_path / "meta.json"}
    convert_adapter(**source, to="v3", output=tmp_path / "v3")
    convert_adapter(**source, to="v2", output=tmp_path / "v2")
    found = json.loads((tmp_path / "v3" / "populi_adapter_manifest_v3.json").read_text())
    assert (found["base_key_map"], found["layer_order"], found["d_model"]) == (keys, [*keys], 3)
    assert json.loads((tmp_path / "v2" / "adapter_meta_v2.json").read_text()) == meta
    convert_adapter(**source, to="peft", output=tmp_path / "peft")
    assert set(open_adapter(tmp_path / "peft").modules) == {"transformer.h.0.attn.c_attn", "lm_head"}


def _config(**entries):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def _tensors(**changes):
    def change(folder):
        path = folder / "adapters.safetensors"
        tensors = {name: np.array(tensor) for name, tensor in read_tensors(path).items()} | changes
        write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, {})

    return change


BROKEN_MLX = {
    "DoRA": (_config(fine_tune_type="dora"), "fine_tune_type is 'dora'"),
    "DoRA as it was once said": (_config(use_dora=True), "use_dora is set"),
    "trained whole": (_config(fine_tune_type="full"), "fine_tune_type is 'full'"),
    "no scale": (_config(lora_parameters={"rank": 4, "dropout": 0.0}), "scale is None"),
    "no rank": (_config(lora_parameters={"scale": 4.0}), "rank is None"),
    "another rank": (_config(lora_parameters={"rank": 8, "scale": 4.0}), "has rank 4, its configuration says 8"),
    "half a pair": (_tensors(**{"lm_head.lora_b": None}), "half of an update is missing: lm_head.lora_b"),
    "experts": (_tensors(**{"lm_head.lora_a": np.ones((2, 4, 5), np.float32)}), "no part of a linear layer's update"),
    "a whole matrix": (_tensors(**{"lm_head.weight": np.ones((2, 4), np.float32)}), "no part of a linear layer's"),
    "a strange graph": (_tensors(**{"trunk.0.lora_a": np.ones((5, 4))}), "what transformers calls trunk.0"),
    "not finite": (_tensors(**{"lm_head.lora_a": np.full((7, 4), np.nan, np.float32)}), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN_MLX)
def test_a_folder_of_mlx_that_is_wrong_is_refused(tmp_path, case):
    change, message = BROKEN_MLX[case]
    convert_adapter(write_peft(tmp_path / "start"), "mlx", tmp_path / "mlx")
    assert open_adapter(tmp_path / "mlx").kind == "mlx"
    change(tmp_path / "mlx")
    with pytest.raises(ModelError, match=message):
        open_adapter(tmp_path / "mlx")


def test_adapter_convert_says_what_it_wrote_and_refuses_a_folder_in_use(tmp_path, capsys):
    words = ["adapter", "convert", str(write_peft(tmp_path / "start")), "--output", str(tmp_path / "out")]
    assert main([*words, "--to", "mlx", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["from"], done["to"], done["modules"]) == ("peft", "mlx", 3)
    assert done["files"] == ["adapter_config.json", "adapters.safetensors"]
    assert main([*words, "--to", "mlx"]) == 2
    assert "the output folder is not empty" in capsys.readouterr().err
    assert main(["adapter", "convert", str(tmp_path / "out"), "--to", "v3", "--output", str(tmp_path / "v3")]) == 2
    assert "--method lora, or --method qlora" in capsys.readouterr().err
