"""The planner's gates: what must hold before the first weight is read, each with a code that never changes.

    of the contract alone      nf4_requires_qlora, qlora_requires_nf4, mobile_edge_*, forced_kernel_agrees
    of the base's folder       config_json_exists, base_is_no_adapter, tokenizer_exists, lab_tokenizer_fits
    of the rows                train_file_exists, row_fits_positions
    of the chosen kernel       backend_available, fits_memory (mens_core.choice)

What became of the older system's gates, one by one, is written in docs/runbook.md.
"""

from __future__ import annotations

from pathlib import Path

from mens_core.contract import LABELS, FineTuneContract
from mens_core.errors import GateError
from mens_core.hf.layout import Layout
from mens_core.plan import GateVerdict
from mens_core.text.lab import VOCABULARY_TOKENS

__all__ = ["base_gates", "contract_gates", "data_gates", "folder_gates", "refuse_failed"]

_EDGE_SEQ_LEN, _EDGE_RANK, _EDGE_BATCH = 512, 32, 1


def contract_gates(contract: FineTuneContract) -> tuple[GateVerdict, ...]:
    """Check what the contract alone shows."""
    method, quant = contract.adapter.method, contract.quant.base_quant
    return (
        GateVerdict(
            code="nf4_requires_qlora",
            passed=not (quant == "nf4" and method != "qlora"),
            message=f"an NF4 base is trained by method qlora (base_quant {quant}, method {method})",
            fix="--backend qlora, or --base-quant none",
        ),
        GateVerdict(
            code="qlora_requires_nf4",
            passed=not (quant == "none" and method == "qlora"),
            message=f"method qlora has an NF4 base (base_quant {quant}, method {method})",
            fix="--backend lora, or --base-quant auto",
        ),
        *_edge_gates(contract),
        _forced_kernel(contract),
        GateVerdict(
            code="early_stopping_evaluates",
            passed=contract.training.early_stopping_patience is None or contract.training.eval_every is not None,
            message="early stopping, if it is asked for, has held-out losses to count",
            fix="--eval-every 100",
        ),
        GateVerdict(
            code="resume_or_overwrite",
            passed=not (contract.output.overwrite and contract.checkpoint.resume != "never"),
            message="a run is gone on with or overwritten, not both",
            fix="leave out --resume or --overwrite",
        ),
    )


def folder_gates(model_dir: Path) -> tuple[GateVerdict, ...]:
    """Check that a base's folder can be looked at."""
    return (
        GateVerdict(
            code="config_json_exists",
            passed=(model_dir / "config.json").is_file(),
            message=f"config.json in {model_dir}, needed for architecture validation",
            fix="point --model at a folder saved by transformers' save_pretrained",
        ),
        GateVerdict(
            code="base_is_no_adapter",
            passed=not (model_dir / "adapter_config.json").exists(),
            message=f"a base, and no adapter, in {model_dir}",
            fix="point --model at the base that the adapter was trained on",
        ),
    )


def base_gates(layout: Layout, tokenizer: str, tokenizer_file: Path) -> tuple[GateVerdict, ...]:
    """Check that there is a tokenizer that fits the base."""
    return (
        GateVerdict(
            code="tokenizer_exists",
            passed=tokenizer == "lab" or tokenizer_file.is_file(),
            message=f"tokenizer.json as {tokenizer_file}",
            fix="save the tokenizer beside the model, name its file with --tokenizer-json, or pass --tokenizer lab",
        ),
        GateVerdict(
            code="lab_tokenizer_fits",
            passed=tokenizer != "lab" or layout.vocab_size >= VOCABULARY_TOKENS,
            message=f"the lab tokenizer's {VOCABULARY_TOKENS} ids within {layout.vocab_size} embedding rows",
            fix="--tokenizer hf",
        ),
    )


def data_gates(
    contract: FineTuneContract, train_file: Path, held_out: Path | None, layout: Layout
) -> tuple[GateVerdict, ...]:
    """Check the rows' place and length."""
    seq_len = contract.data.seq_len
    return (
        GateVerdict(
            code="train_file_exists",
            passed=train_file.is_file(),
            message=f"training rows in {train_file}",
            fix="python -m mens_core corpus pairs <sources> --output <data-dir>",
        ),
        GateVerdict(
            code="held_out_file_exists",
            passed=contract.training.eval_every is None or held_out is not None,
            message=f"held-out rows beside {train_file}, if eval_every asks for their loss",
            fix="put eval.jsonl beside the training rows, or leave out --eval-every",
        ),
        GateVerdict(
            code="row_fits_positions",
            passed=seq_len <= layout.max_positions,
            message=f"seq_len {seq_len} within the model's {layout.max_positions} positions",
            fix=f"--seq-len {layout.max_positions}",
        ),
    )


def refuse_failed(verdicts: tuple[GateVerdict, ...], what: str = "the plan is refused") -> None:
    """Raise for the gates that did not pass, all together.

    Raises:
        GateError: naming each failed gate's code and what mends it.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        lines = [f"  - [{verdict.code}] not so: {verdict.message}" for verdict in failed]
        mends = dict.fromkeys(verdict.fix for verdict in failed if verdict.fix)
        codes = tuple(verdict.code for verdict in failed)
        raise GateError(f"{what}:\n" + "\n".join(lines), fix="; ".join(mends) or None, codes=codes)


def _edge_gates(contract: FineTuneContract) -> tuple[GateVerdict, ...]:
    if contract.output.deployment_target != "mobile_edge":
        return ()
    seq_len, rank = contract.data.seq_len, contract.adapter.largest_rank
    batch, device = contract.training.batch_size, contract.compute.device
    full_stack = contract.quant.qlora_require_full_proxy_stack
    checks = (
        ("full_stack", not full_stack, "no demand for the full proxy stack", "drop --qlora-require-full-proxy-stack"),
        ("seq_len", seq_len <= _EDGE_SEQ_LEN, f"seq_len {seq_len} of at most {_EDGE_SEQ_LEN}", "--seq-len 512"),
        ("rank", rank <= _EDGE_RANK, f"rank {rank} of at most {_EDGE_RANK}", "--rank 32"),
        ("batch_size", batch <= _EDGE_BATCH, f"batch_size {batch} of at most {_EDGE_BATCH}", "--batch-size 1"),
        ("device", device == "cpu", f"device {device!r}, which has to be cpu", "--device cpu"),
    )
    return tuple(
        GateVerdict(code=f"mobile_edge_{name}", passed=passed, message=f"for mobile_edge, {message}", fix=fix)
        for name, passed, message, fix in checks
    )


def _forced_kernel(contract: FineTuneContract) -> GateVerdict:
    """Whether the kernel that was asked for by name is the one that backend, method and base come to."""
    forced, method = contract.compute.kernel, contract.adapter.method
    named = contract.compute.backend
    inferred = LABELS[method] if forced in LABELS.values() else f"{named}_{method}"
    return GateVerdict(
        code="forced_kernel_agrees",
        passed=forced is None or forced == inferred,
        message=f"kernel {forced or 'not forced'}, inferred {inferred} (method {method}, "
        f"base_quant {contract.quant.base_quant}, backend {named})",
        fix="name one kernel: leave out --method and --kernel, or --backend",
    )
