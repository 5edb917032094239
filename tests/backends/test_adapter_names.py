"""The adapter file of a run obeys the rules by which those who serve it find their tensors.

Sources of the rules:
    vLLM       github.com/vllm-project/vllm, vllm/lora/utils.py (parse_fine_tuned_lora_name), lora_model.py
               (from_local_checkpoint) and peft_helper.py
    llama.cpp  github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py (get_base_tensor_name, get_tensors)
"""

import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mens_core.artifacts.adapter import write_adapter
from mens_core.artifacts.tensors import read_tensors

PREFIX = "base_model.model."


def found_by_vllm(name, modules):
    """VLLM's module and half: two parts go in front and two behind, and the last that is left names a linear layer."""
    *path, half, weight = name.split(".")
    if not name.startswith(PREFIX) or weight != "weight" or half not in {"lora_A", "lora_B"}:
        return None
    module = ".".join(path[2:])
    return (module, half) if module in modules else None


def found_by_llama_cpp(name, tensors):
    """llama.cpp's tensor of the base and half: the prefix goes, and the half's name where the weight's then stands."""
    half = next((half for half in ("lora_A", "lora_B") if f".{half}.weight" in name), None)
    tensor = name.replace(PREFIX, "").replace(f".{half}.weight", ".weight")
    return (tensor, half) if half and tensor in tensors else None


@pytest.fixture
def written(backend, adapted, folders, family, tmp_path):
    """The adapter's folder, and the same model as transformers names it."""
    _, adapter = adapted(family)
    write_adapter(tmp_path, adapter, tiny.plan_for(backend, folders[family]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[family]))
    return tmp_path, model


def test_every_tensor_is_found_by_those_who_serve_it(written):
    folder, model = written
    names = read_tensors(folder / "adapter_model.safetensors")
    modules, tensors = dict(model.named_modules()), model.state_dict()
    by_vllm = {found_by_vllm(name, modules) for name in names}
    by_llama_cpp = {found_by_llama_cpp(name, tensors) for name in names}
    for found in (by_vllm, by_llama_cpp):
        assert None not in found
        assert len(found) == len(names)
    assert {(f"{module}.weight", half) for module, half in by_vllm} == by_llama_cpp


def test_a_name_that_pefts_modules_have_in_memory_would_not_be_found(written):
    """The twin: with PEFT's name of the adapter in it, or without the prefix in front."""
    folder, model = written
    modules, tensors = dict(model.named_modules()), model.state_dict()
    for name in read_tensors(folder / "adapter_model.safetensors"):
        inside = name.replace(".weight", ".default.weight")
        assert found_by_vllm(inside, modules) is found_by_llama_cpp(inside, tensors) is None
        assert found_by_vllm(name.removeprefix(PREFIX), modules) is None


def test_halves_share_a_rank_and_the_configuration_has_what_is_asked_of_it(written):
    folder, _ = written
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_tensors(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            assert tensor.shape[0] == tensors[name.replace("lora_A", "lora_B")].shape[1] == config["r"]
    assert isinstance(config["lora_alpha"], int)
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    assert config["base_model_name_or_path"]
    in_file = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    assert set(config["target_modules"]) == in_file
