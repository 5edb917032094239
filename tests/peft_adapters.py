"""Adapters as PEFT makes them, with random numbers in them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

__all__ = ["peft_adapter"]


def peft_adapter(base, folder, **settings):
    """An adapter that PEFT made, of rank 4 on all linear layers unless the settings say otherwise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False} | settings
    if model.config.model_type == "gpt2":
        config["fan_in_fan_out"] = True
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return folder
