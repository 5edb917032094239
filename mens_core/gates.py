"""The planner's gates: what must hold before the first weight is read, each with a code that never changes."""

from __future__ import annotations

from pathlib import Path

from mens_core.contract import DataSpec
from mens_core.errors import GateError
from mens_core.exchange import GateVerdict
from mens_core.hf.layout import Layout
from mens_core.text.lab import VOCABULARY_TOKENS

__all__ = ["base_gates", "data_gates", "refuse_failed"]


def base_gates(layout: Layout, model_dir: Path, tokenizer: str) -> tuple[GateVerdict, ...]:
    """Check the base model's folder, in a fixed order."""
    return (
        GateVerdict(
            code="tokenizer_exists",
            passed=tokenizer == "lab" or (model_dir / "tokenizer.json").is_file(),
            message=f"tokenizer.json in {model_dir}",
        ),
        GateVerdict(
            code="lab_tokenizer_fits",
            passed=tokenizer != "lab" or layout.vocab_size >= VOCABULARY_TOKENS,
            message=f"the lab tokenizer's {VOCABULARY_TOKENS} ids within {layout.vocab_size} embedding rows",
        ),
    )


def data_gates(data: DataSpec, layout: Layout) -> tuple[GateVerdict, ...]:
    """Check the rows' place and length, in a fixed order."""
    train_file = data.train_file
    return (
        GateVerdict(code="train_file_exists", passed=train_file.is_file(), message=f"training rows in {train_file}"),
        GateVerdict(
            code="row_fits_positions",
            passed=data.seq_len <= layout.max_positions,
            message=f"seq_len {data.seq_len} within the model's {layout.max_positions} positions",
        ),
    )


_MENDS = {
    "train_file_exists": "python -m mens_core corpus pairs <sources> --output <data-dir>",
    "tokenizer_exists": "save the tokenizer beside the model, or pass --tokenizer lab",
    "row_fits_positions": "lower --seq-len",
    "lab_tokenizer_fits": "use --tokenizer hf",
}


def refuse_failed(verdicts: tuple[GateVerdict, ...]) -> None:
    """Raise for the gates that did not pass, all together.

    Raises:
        GateError: naming each failed gate's code and what mends it.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        lines = [f"  - [{v.code}] not so: {v.message}" for v in failed]
        mends = [_MENDS[v.code] for v in failed if v.code in _MENDS]
        raise GateError("the plan is refused:\n" + "\n".join(lines), fix="; ".join(mends) or None)
