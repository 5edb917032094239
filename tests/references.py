"""What transformers, PEFT and torch answer to the same question: the truth that both backends are held to.

Every row goes through the model by itself, unpadded, so no packing of anybody's is involved.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mens_core.exchange import IGNORE


def open_model(folder):
    """The model, in float32 and without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model, batch):
    """(T, V), row by row."""
    rows = torch.split(torch.tensor(batch.input_ids).long(), batch.row_lengths.tolist())
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def loss_sum(model, batch):
    """Sum of the cross-entropies at the batch's targets."""
    targets = torch.tensor(batch.targets).long()
    return functional.cross_entropy(logits_of(model, batch), targets, ignore_index=IGNORE, reduction="sum")


def linears(model):
    """Module path → linear layer of the decoder."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }


def with_weights(model, change):
    """The model with ``change(weight)`` in the place of each linear layer's (out, in) weight."""
    with torch.no_grad():
        for path, module in linears(model).items():
            flipped = isinstance(module, Conv1D)
            weight = module.weight.t() if flipped else module.weight
            changed = torch.tensor(change(path, weight.numpy().copy()))
            module.weight.copy_(changed.t() if flipped else changed)
    return model


def with_adapter(model, adapter, *, rank, alpha, **settings):
    """The model under PEFT's LoRA, with the given numbers; and the parameters by the name all backends share."""
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in adapter if ".lora_" in name})
    whole = sorted({name.rpartition(".")[0] for name in adapter if ".lora_" not in name})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        fan_in_fan_out=model.config.model_type == "gpt2",
        modules_to_save=whole or None,
        **settings,
    )
    wrapped = get_peft_model(model, config).eval()
    parameters = {
        name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in wrapped.named_parameters()
        if "lora_" in name or ".modules_to_save." in name
    }
    assert set(parameters) == set(adapter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(adapter[name]))
    return wrapped, parameters


def train(model, parameters, windows, *, rates, max_grad_norm, weight_decay=0.0):
    """Steps of torch's AdamW with torch's clipping; the loss is the mean over each window's supervised tokens.

    Returns:
        (norms before clipping, the optimizer).
    """
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=weight_decay)
    norms = []
    for window, rate in zip(windows, rates, strict=True):
        optimizer.zero_grad()
        supervised = sum(batch.supervised_tokens for batch in window)
        (sum(loss_sum(model, batch) for batch in window) / supervised).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return norms, optimizer
