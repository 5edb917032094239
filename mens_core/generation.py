"""Answer a prompt with a base, or with a base and its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapter import read_adapter, read_adapter_config
from mens_core.artifacts.rundir import MANIFEST
from mens_core.contract import FineTuneContract
from mens_core.corpus.row import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings, TrainingState
from mens_core.gates import refuse_failed
from mens_core.planner import resolve
from mens_core.text.chat import TURN_END, opening
from mens_core.text.encode import Encoder, open_tokenizer

__all__ = ["generate"]

_DECIDED_BY_A_RUN = (
    "model",
    "revision",
    "tokenizer",
    "tokenizer_json",
    "method",
    "rank",
    "alpha",
    "rslora",
    "targets",
    "block_size",
    "double_quant",
)
_A = ".lora_A.weight"


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
    folder = Path(adapter) if adapter is not None else None
    given = {"model": model, **fields} if model is not None else fields
    contract = FineTuneContract.from_fields(trains=False, **((_adapter_fields(folder) if folder else {}) | given))
    plan, backend = resolve(contract, trains=False)
    refuse_failed(plan.preflight, "preflight refuses the base")
    encoder = Encoder(open_tokenizer(plan.tokenizer_file, plan.layout))
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
    # A tokenizer without ChatML's tags spells the end tag in several tokens, which stop no decoding.
    return encoder.tokenizer.decode(answer, skip_special_tokens=False).partition(TURN_END)[0]


def _adapter_fields(folder: Path) -> dict[str, Any]:
    """The contract fields that an adapter's own files decide: a run's manifest, else PEFT's config."""
    record = folder / MANIFEST
    if record.is_file():
        try:
            asked = json.loads(record.read_text(encoding="utf-8"))["plan"]["contract"]
            return {name: asked[name] for name in _DECIDED_BY_A_RUN}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the run's manifest cannot be read: {error!r}", where=record) from error
    config = read_adapter_config(folder)
    return {
        "model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora", False)),
        "targets": tuple(name.removesuffix(_A) for name in read_adapter(folder) if name.endswith(_A)),
    }
