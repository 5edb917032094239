"""How well a model says what rows have their assistant say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.inference import open_model
from mens_core.text.pack import Batching
from mens_core.training.loop import evaluate

__all__ = ["evaluate_model"]


def evaluate_model(
    data: str | Path, *, model: str | None = None, adapter: str | Path | None = None, **fields: Any
) -> dict[str, Any]:
    """Measure the loss of a base, of a base with its adapter, or of a merged model.

    Args:
        data: a file of rows.
        model: folder or hub id of the base; None for the one the adapter was trained on, or the lab base.
        adapter: a run directory, or any folder in PEFT's format; None for the model alone.
        **fields: further fields of the contract, such as ``backend``, ``batch_size`` or ``seq_len``.

    Returns:
        ``loss`` in nats a supervised token, ``perplexity``, ``rows``, ``tokens``, ``supervised_tokens`` and
        ``execution_kernel``.

    Raises:
        MensError: if model, adapter, rows or backend cannot be used.
    """
    opened = open_model(model, open_adapter(Path(adapter)) if adapter is not None else None, **fields)
    rows = opened.rows(Path(data))
    session = opened.session(Batching.of(opened.plan.contract).shape(rows, 1))
    loss = evaluate(opened.backend, session, rows, opened.plan.contract.training.batch_size)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "rows": len(rows),
        "tokens": rows.tokens,
        "supervised_tokens": int(rows.trained.sum()),
        "execution_kernel": opened.plan.execution_kernel,
        "model": opened.plan.model_name,
        "adapter": str(adapter) if adapter is not None else None,
    }
