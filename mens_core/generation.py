"""Answer a prompt with a base, or with a base and its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapter import V3_MANIFEST, read_adapter, read_adapter_config
from mens_core.contract import FineTuneContract
from mens_core.corpus.rows import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings, TrainingState
from mens_core.planner import resolve
from mens_core.text.chat import opening
from mens_core.text.encode import Encoder, open_tokenizer

__all__ = ["generate"]


def generate(
    prompt: str,
    *,
    model: str | None = None,
    adapter: str | Path | None = None,
    max_new_tokens: int = 128,
    **fields: Any,
) -> str:
    """Answer one prompt, greedily.

    Args:
        prompt: the user's turn.
        model: folder or hub id of the base; None for the lab base.
        adapter: a run directory, or any folder in PEFT's format; None for the base alone.
        max_new_tokens: longest answer.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Returns:
        The assistant's turn, without its end tag.

    Raises:
        MensError: if base, adapter or backend cannot be used, or the prompt leaves no room for an answer.
    """
    folder = Path(adapter) if adapter is not None else None
    contract = FineTuneContract.from_fields(
        trains=False, model=model, **(_adapter_fields(folder) if folder else {}), **fields
    )
    plan, backend = resolve(contract, trains=False)
    encoder = Encoder(open_tokenizer(plan))
    ids = encoder.encode([opening([Turn(role="user", content=prompt)])])[0].input_ids
    room = plan.layout.max_positions - len(ids)
    if room < 1:
        raise ModelError(f"the prompt has {len(ids)} tokens", expected=f"fewer than {plan.layout.max_positions}")
    shape = BatchShape(rows=1, tokens=len(ids), longest_row=len(ids), supervised=1, batches=1)
    session = backend.open(plan, shape)
    if folder:
        state = TrainingState(adapter=read_adapter(folder), optimizer={}, step=0)
        session = backend.restore(session, state)
    settings = GenerateSettings(max_new_tokens=min(max_new_tokens, room), stop_tokens=encoder.stop_tokens())
    answer = backend.generate(session, ids.tolist(), settings)
    if answer and answer[-1] in settings.stop_tokens:
        answer = answer[:-1]
    return encoder.tokenizer.decode(answer, skip_special_tokens=False)


def _adapter_fields(folder: Path) -> dict[str, Any]:
    """The contract fields that an adapter's own files decide."""
    config = read_adapter_config(folder)
    targets = config.get("target_modules")
    manifest = folder / V3_MANIFEST
    method = json.loads(manifest.read_text(encoding="utf-8"))["adapter_method"] if manifest.is_file() else "lora"
    return {
        "method": method,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora", False)),
        "targets": tuple(targets) if isinstance(targets, list) else ("all-linear",),
    }
