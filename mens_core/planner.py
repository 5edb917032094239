"""Planner: decide first, then run what was decided.

plan:  contract ─▶ model folder ─▶ layout ─▶ gates ─▶ every backend's offer ─▶ ExecutionPlan
run:   plan ─▶ rows ─▶ run directory ─▶ session ─▶ loop ─▶ adapter, manifest
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.header import TensorInfo
from mens_core.artifacts.tensors import TensorFolder, open_tensors
from mens_core.backend import Backend
from mens_core.contract import FineTuneContract
from mens_core.corpus.rows import sample_rows
from mens_core.errors import ContractError, GateError, ModelError, PluginError
from mens_core.exchange import BaseWeights, ExecutionPlan, KernelOffer, Workload
from mens_core.gates import base_gates, data_gates, refuse_failed
from mens_core.hf.hub import find_model
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import FAMILIES, Layout, read_layout
from mens_core.machine import this_machine
from mens_core.plugins import installed_backends, load_backend
from mens_core.text.encode import Encoder, encode_rows, open_tokenizer
from mens_core.text.workload import workload
from mens_core.training.run import RunResult, run_plan
from mens_core.training.telemetry import Observer

__all__ = ["Planner", "resolve"]

# Rows that are tokenised to learn how long a run's rows are; 256 of them take a few hundredths of a second.
_SAMPLED_ROWS = 256
_RUNBOOK_KERNELS = {"lora": "burn_lora", "qlora": "candle_qlora"}


class Planner:
    """Picks a kernel before anything is spent, and runs the plan.

    Example:
        >>> from mens_core import Planner
        >>> result = Planner().run(data_dir="corpus", output_dir="run", method="lora")  # doctest: +SKIP
    """

    def plan(self, contract: FineTuneContract | None = None, **fields: Any) -> ExecutionPlan:
        """Decide what would be done; writes nothing.

        Args:
            contract: what is asked for; or
            **fields: its fields by name, see ``FineTuneContract``.

        Raises:
            ContractError: a field is wrong, or contract and fields are both given.
            ModelError: the base cannot be found or read.
            GateError: the run cannot work, or no backend can do it.
            PluginError: the backend asked for cannot be used.
        """
        return resolve(_contract(contract, fields))[0]

    def run(
        self, contract: FineTuneContract | None = None, *, observers: Sequence[Observer] = (), **fields: Any
    ) -> RunResult:
        """Plan, train, and leave a complete run directory.

        Args:
            contract: what is asked for; or
            observers: called with every telemetry event.
            **fields: the contract's fields by name.

        Raises:
            MensError: whatever ``plan`` raises; DataError for the rows; RunDirectoryError for the folder;
                TrainingError for a run that had to be stopped, which the manifest then records as failed.
        """
        plan, backend = resolve(_contract(contract, fields))
        return run_plan(plan, backend, observers)


def resolve(contract: FineTuneContract, *, trains: bool = True) -> tuple[ExecutionPlan, Backend]:
    """Turn a contract into a plan and the loaded backend that offered it.

    Args:
        contract: what is asked for.
        trains: whether the gates on data apply.

    Raises:
        MensError: as ``Planner.plan`` says.
    """
    model_name, model_dir = find_model(contract.model.model, contract.model.revision)
    layout = read_layout(model_dir)
    tokenizer = _tokenizer(contract)
    gates = base_gates(layout, model_dir, tokenizer) + (data_gates(contract.data, layout) if trains else ())
    refuse_failed(gates)
    weights = open_tensors(model_dir)
    work = _workload(contract, layout, model_dir, tokenizer) if trains else None
    offers, backend = _choose(contract, layout, _base_weights(layout, weights), work)
    contents = _contents(contract, model_dir, tokenizer, weights)
    plan = ExecutionPlan(
        contract=contract,
        layout=layout,
        backend=backend.name,
        execution_kernel=offers[-1].kernel,
        runbook_kernel=_RUNBOOK_KERNELS[contract.adapter.method],
        candle_compat_mode=contract.adapter.method == "qlora",
        contract_digest=contract.digest(contents),
        model_name=model_name,
        model_dir=model_dir,
        tokenizer=tokenizer,
        device=offers[-1].device,
        dtype=offers[-1].dtype,
        contents=contents,
        offers=offers,
        gates=gates,
        warnings=_warnings(model_dir, tokenizer),
    )
    further = backend.gates(contract, plan)
    refuse_failed(further)
    return attrs.evolve(plan, gates=(*gates, *further)), backend


def _tokenizer(contract: FineTuneContract) -> str:
    if contract.model.tokenizer != "auto":
        return contract.model.tokenizer
    return "lab" if contract.model.model is None else "hf"


def _contract(contract: FineTuneContract | None, fields: Mapping[str, Any]) -> FineTuneContract:
    if contract is None:
        return FineTuneContract.from_fields(**fields)
    if fields:
        raise ContractError(
            f"give a contract or its fields, not both (got {', '.join(fields)})",
            fix="FineTuneContract.from_fields(**{**contract.as_fields(), ...})",
        )
    return contract


def _choose(
    contract: FineTuneContract, layout: Layout, weights: BaseWeights, workload: Workload | None
) -> tuple[tuple[KernelOffer, ...], Backend]:
    """Ask the backends in order and take the first that can; the last offer of the answer is the chosen one.

    A backend the user named is asked alone and never replaced.
    """
    machine = this_machine()
    if contract.compute.backend != "auto":
        backend = load_backend(contract.compute.backend)
        offers = [backend.plan(contract, layout, machine, weights, workload)]
        if offers[0].feasible:
            return tuple(offers), backend
        raise _nothing_feasible(offers, layout)
    offers = []
    for info in installed_backends():
        kernel = f"{info.name}_{contract.adapter.method}"
        if info.missing:
            reason = f"needs {', '.join(info.missing)}: {info.install}"
            offers.append(KernelOffer(kernel=kernel, feasible=False, reason=reason))
            continue
        try:
            backend = load_backend(info.name)
            offers.append(backend.plan(contract, layout, machine, weights, workload))
        except PluginError as error:
            # One broken plugin must not stop the others; what is wrong with it stays on the plan.
            offers.append(KernelOffer(kernel=kernel, feasible=False, reason=error.what))
            continue
        if offers[-1].feasible:
            return tuple(offers), backend
    raise _nothing_feasible(offers, layout)


def _nothing_feasible(offers: Sequence[KernelOffer], layout: Layout) -> GateError:
    lines = [f"  - {offer.kernel}: {offer.reason}" for offer in offers] or ["  - no backend is installed"]
    return GateError(
        f"no backend can train model_type {layout.model_type!r} as asked:\n" + "\n".join(lines),
        expected=f"{', '.join(FAMILIES)} on torch or jax; torch also takes what transformers knows",
        fix="python -m mens_core backends",
    )


def _base_weights(layout: Layout, weights: TensorFolder) -> BaseWeights:
    headers = weights.headers
    known = layout.family is not None
    return BaseWeights(
        parameters=sum(math.prod(info.shape) for info in headers.values()),
        stored_bytes=sum(info.stop - info.start for info in headers.values()),
        linears=linear_shapes(layout) if known else _square_guess(layout, headers),
    )


def _square_guess(layout: Layout, headers: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Matrices that are neither an embedding nor a head, where the core does not know the family."""
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in headers.items()
        if len(info.shape) == 2 and layout.vocab_size not in info.shape
    }


def _workload(contract: FineTuneContract, layout: Layout, model_dir: Path, tokenizer: str) -> Workload:
    """What there is to train on, from a sample of the rows."""
    data = contract.data
    sample, count = sample_rows(data.train_file, _SAMPLED_ROWS)
    encoder = Encoder(open_tokenizer(tokenizer, model_dir, layout))
    # Whether too many rows are too long is judged on all of them, when they are read.
    policy = "drop" if data.on_overlong in {"auto", "error"} else data.on_overlong
    kept = encode_rows(sample, encoder, seq_len=data.seq_len, on_overlong=policy).rows
    rows = max(1, round(count * len(kept) / len(sample)))
    source = "all rows" if count == len(sample) else f"{len(sample)} of about {count:,} rows"
    return workload(kept, contract.training, num_rows=rows, source=source)


def _contents(contract: FineTuneContract, model_dir: Path, tokenizer: str, weights: TensorFolder) -> dict[str, str]:
    """Sha256 of every small input, by a name that holds no path; of the weights, names, types and shapes only."""
    files = {"config.json": model_dir / "config.json"}
    files |= {"tokenizer.json": model_dir / "tokenizer.json"} if tokenizer == "hf" else {}
    if contract.data.data_dir is not None:
        files |= {"train.jsonl": contract.data.train_file, "eval.jsonl": contract.data.eval_file}
    headers = sorted((name, info.dtype, info.shape) for name, info in weights.headers.items())
    described = hashlib.sha256(json.dumps(headers).encode()).hexdigest()
    return {name: sha256_file(path) for name, path in files.items() if path.is_file()} | {"weight_headers": described}


def _warnings(model_dir: Path, tokenizer: str) -> tuple[str, ...]:
    if tokenizer == "hf" and _has_template(model_dir):
        return ("the model ships a chat template of its own; this run renders ChatML instead",)
    return ()


def _has_template(model_dir: Path) -> bool:
    if any((model_dir / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = model_dir / "tokenizer_config.json"
    try:
        return path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"tokenizer_config.json cannot be read: {error}", where=path) from error
