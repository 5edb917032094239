"""MODEL_CARD.md: what a person who finds the folder needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mens_core.plan import ExecutionPlan

__all__ = ["model_card"]


def model_card(plan: ExecutionPlan, *, tensors: Sequence[str], parameters: int, results: Mapping[str, Any]) -> str:
    """Render the card.

    Args:
        plan: of the run.
        tensors: names of what was trained, as a session's state has them.
        parameters: trained numbers.
        results: losses and counts, as in the manifest.
    """
    spec, training = plan.contract.adapter, plan.contract.training
    kind = "QLoRA (NF4 base)" if spec.method == "qlora" else "LoRA"
    before, after = results.get("eval_loss_before"), results.get("eval_loss_after")
    named = {
        "Name": spec.adapter_tag,
        "Published as": plan.contract.provenance.upstream_model_id,
        "Family": plan.contract.provenance.base_family,
        "Licence of the base": plan.contract.provenance.license_class,
        "Attribution": "required by that licence" if plan.contract.provenance.attribution_required else None,
        "Deployment": "mobile_edge" if plan.contract.output.deployment_target == "mobile_edge" else None,
    }
    own = "; own ranks or alphas by pattern" if spec.has_patterns else ""
    modules = sum(name.endswith(".lora_A.weight") for name in tensors)
    whole = len({name.rpartition(".")[0] for name in tensors if ".lora_" not in name})
    beside = f", {whole} modules trained whole" if whole else ""
    further = "".join(f"\n| {label} | {value} |" for label, value in named.items() if value is not None)
    held_out = f"{before:.4f} → {after:.4f} nats per token" if before is not None else "no eval.jsonl was given"
    return f"""---
base_model: {plan.model_name}
library_name: peft
tags: [lora, {plan.execution_kernel}]
---

# {kind} adapter of {plan.model_name}

Trained by mens-core with kernel `{plan.execution_kernel}` on {plan.device} in {plan.dtype}.

| | |
|---|---|
| Base model | {plan.model_name} ({plan.layout.model_type}) |
| Adapter | rank {spec.rank}, alpha {spec.alpha:g}{own}, {modules} linear layers{beside}, {parameters:,} parameters |
| Data | {results["rows"]:,} rows, {results["supervised_tokens"]:,} supervised of {results["tokens"]:,} tokens |
| Steps | {results["optimizer_steps"]} of {training.batch_size} × {training.grad_accum} rows |
| Training loss | {results["first_loss"]:.4f} → {results["last_loss"]:.4f} nats per token |
| Held-out loss | {held_out} |{further}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("path/to/base")  # {plan.model_name}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Prompts are ChatML: `<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n`.

The full record of the run is in `training_manifest.json`.
"""
