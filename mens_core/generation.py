"""Answer a prompt with a base, or with a base and its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.lora import LoraAdapter
from mens_core.artifacts.rundir import MANIFEST
from mens_core.contract import FineTuneContract
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings, TrainingState
from mens_core.gates import refuse_failed
from mens_core.planner import resolve
from mens_core.text.encode import open_encoder

__all__ = ["generate"]

_DECIDED_BY_A_RUN = (
    "model",
    "revision",
    "tokenizer",
    "tokenizer_json",
    "method",
    "block_size",
    "double_quant",
)


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
        model: folder or hub id of the base; None for the one the adapter was trained on, or the lab base.
        adapter: a run directory, or any folder in PEFT's format; None for the base alone.
        max_new_tokens: longest answer.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Returns:
        The assistant's turn, without its end tag.

    Raises:
        MensError: if base, adapter or backend cannot be used, or the prompt leaves no room for an answer.
    """
    opened = open_adapter(Path(adapter)) if adapter is not None else None
    given = {"model": model, **fields} if model is not None else fields
    contract = FineTuneContract.from_fields(trains=False, **((_adapter_fields(opened) if opened else {}) | given))
    plan, backend = resolve(contract, trains=False)
    refuse_failed(plan.preflight, "preflight refuses the base")
    encoder = open_encoder(plan.tokenizer, plan.tokenizer_file, plan.model_dir, plan.layout)
    try:
        ids = encoder.prompt(encoder.chat.prompt([Turn(role="user", content=prompt)]))
    except Fault as fault:
        raise ModelError(f"the prompt cannot be written: {fault.kind}", expected=fault.expected) from fault
    room = plan.layout.max_positions - len(ids)
    if room < 1:
        raise ModelError(f"the prompt has {len(ids)} tokens", expected=f"fewer than {plan.layout.max_positions}")
    shape = BatchShape(rows=1, tokens=len(ids), longest_row=len(ids), supervised=1, batches=1)
    session = backend.open(plan, shape)
    if opened:
        session = backend.restore(session, TrainingState(adapter=opened.stacked()[0], optimizer={}, step=0))
    settings = GenerateSettings(max_new_tokens=min(max_new_tokens, room), stop_tokens=encoder.stop_tokens())
    answer = backend.generate(session, ids, settings)
    if answer and answer[-1] in settings.stop_tokens:
        answer = answer[:-1]
    text = encoder.tokenizer.decode(answer, skip_special_tokens=False)
    # A tokenizer without the template's tags spells an end tag in several tokens, which stop no decoding.
    return min((text.partition(tag)[0] for tag in encoder.chat.end_tags), key=len, default=text)


def _adapter_fields(adapter: LoraAdapter) -> dict[str, Any]:
    """The contract fields that an adapter's own files decide: a run's manifest, else PEFT's configuration."""
    folder = adapter.source if adapter.source.is_dir() else adapter.source.parent
    record = folder / MANIFEST
    asked = {}
    if record.is_file():
        try:
            contract = json.loads(record.read_text(encoding="utf-8"))["plan"]["contract"]
            asked = {name: contract[name] for name in _DECIDED_BY_A_RUN}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the run's manifest cannot be read: {error!r}", where=record) from error
    _, rank, scale = adapter.stacked()
    shape = {"rank": rank, "alpha": scale * rank, "rslora": False, "targets": adapter.modules}
    return {"model": adapter.base_model, **asked, **shape}
