"""Planner: decide first, then run what was decided.

plan:  contract ─▶ model folder ─▶ layout, headers ─▶ gates ─▶ rows, a sample ─▶ backends' offers ─▶ ExecutionPlan
run:   plan ─▶ preflight ─▶ rows, all ─▶ run directory ─▶ session ─▶ loop ─▶ adapter, manifest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mens_core.artifacts.adapters import weights_of
from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.tensors import TensorFolder
from mens_core.backend import Backend
from mens_core.choice import Choice, Question, choice_gates, choose
from mens_core.config import build_contract
from mens_core.contract import LABELS, FineTuneContract
from mens_core.errors import ContractError
from mens_core.gates import contract_gates, refuse_failed
from mens_core.machine import this_machine
from mens_core.parity.subjects import certify_run, refuse_uncertified
from mens_core.plan import ExecutionPlan, GateVerdict, KernelOffer, Machine
from mens_core.plugins import add_observers, check_observers, load_backend
from mens_core.preflight import (
    coverage_warning,
    existing_targets,
    finite_weights,
    fitting_tensors,
    matching_patterns,
    readable_rows,
    rotary_pairs,
    start_fields,
    start_fits,
    strict_proxy_stack,
    whole_modules_exist,
)
from mens_core.speeds import outdated_speeds, read_speeds
from mens_core.survey import Base, Rows, look_at_base, look_at_rows
from mens_core.training.between import Stop
from mens_core.training.result import RunResult
from mens_core.training.run import run_plan
from mens_core.training.schedule import warmup_for
from mens_core.training.telemetry import Observer

__all__ = ["Planner", "decide", "plan_in_float32", "resolve"]


class Planner:
    """Picks a kernel before anything is spent, and runs the plan.

    Example:
        >>> from mens_core import Planner
        >>> result = Planner().run(data_dir="corpus", output_dir="run", method="lora")  # doctest: +SKIP
    """

    def plan(
        self,
        contract: FineTuneContract | None = None,
        *,
        config: str | Path | None = None,
        preset: str | None = None,
        compare: bool = False,
        **fields: Any,
    ) -> ExecutionPlan:
        """Decide what would be done; writes nothing, reads no weight, loads no framework unless it must answer.

        Args:
            contract: what is asked for; or
            config: a YAML file of fields,
            preset: the name of a preset, which wins over the file,
            compare: whether every backend is asked with every method, for a plan that shows them side by side.
            **fields: fields by name, which win over both, see ``FineTuneContract``.

        Raises:
            ContractError: a field is wrong, or contract and fields are both given.
            ModelError: the base cannot be found or read.
            DataError: no row can be used.
            GateError: the run cannot work, no backend can do it, or it does not fit the memory.
            PluginError: the backend asked for cannot be used.
        """
        return decide(_contract(contract, config, preset, fields), compare=compare)

    def run(
        self,
        contract: FineTuneContract | None = None,
        *,
        observers: Sequence[Observer] = (),
        config: str | Path | None = None,
        preset: str | None = None,
        stop: Stop = lambda: None,
        **fields: Any,
    ) -> RunResult:
        """Plan, train, and leave a complete run directory.

        Args:
            contract: what is asked for; or
            observers: called with every telemetry event.
            config: a YAML file of fields,
            preset: the name of a preset,
            stop: asked after each step; a text, such as the reason, ends the run in order, with a checkpoint to go
                on from.
            **fields: fields by name.

        Raises:
            MensError: whatever ``plan`` raises; GateError for what preflight finds; DataError for the rows;
                RunDirectoryError for the folder; ResumeError for a checkpoint; TrainingError for a run that had to be
                stopped, which the manifest then records as failed; RunInterrupted for one that was told to stop.
        """
        plan, backend = resolve(_contract(contract, config, preset, fields))
        refuse_failed(plan.preflight, "preflight refuses the run")
        certificate = None
        if plan.contract.compute.certify:
            certificate = certify_run(plan, plan_in_float32)
            refuse_uncertified(certificate)
        add_observers(backend, plan)
        return run_plan(plan, backend, observers, certificate, stop)


def resolve(contract: FineTuneContract, *, trains: bool = True) -> tuple[ExecutionPlan, Backend]:
    """Turn a contract into a plan and the backend it chose, loaded whole.

    Args:
        contract: what is asked for.
        trains: whether there are rows.

    Raises:
        MensError: as ``Planner.plan`` says.
    """
    plan = decide(contract, trains=trains, weights=True)
    return plan, load_backend(plan.backend)


def plan_in_float32(fields: Mapping[str, Any]) -> tuple[ExecutionPlan, Backend]:
    """Plan a session for comparing numbers: float32 whatever the device, no rows, no text.

    Args:
        fields: of the contract; ``model`` and ``backend`` among them.

    Raises:
        MensError: as ``Planner.plan`` says.
    """
    # No text is read, so any tokenizer will do that the gates accept.
    tokenizer = "auto" if (Path(fields["model"]) / "tokenizer.json").is_file() else "lab"
    contract = FineTuneContract.from_fields(trains=False, dtype="float32", tokenizer=tokenizer, **fields)
    return resolve(contract, trains=False)


def decide(
    contract: FineTuneContract, *, trains: bool = True, compare: bool = False, weights: bool = False
) -> ExecutionPlan:
    """Turn a contract into a plan.

    Args:
        contract: what is asked for.
        trains: whether there are rows.
        compare: whether every backend is asked with every method.
        weights: whether the weights of a hub id are downloaded; a plan needs their headers only.

    Raises:
        MensError: as ``Planner.plan`` says.
    """
    asked = contract_gates(contract)
    refuse_failed(asked)
    check_observers(contract.output.report_to)
    base = look_at_base(contract, weights=weights or contract.model.scan_weights)
    if fields := start_fields(contract, base.inventory.linears):
        contract = contract.changed(f"adapter {contract.adapter.start_from}", **fields)
    rows = look_at_rows(contract, base) if trains else None
    preflight = _preflight(contract, base, rows)
    machine = this_machine()
    question = Question(
        contract=contract,
        layout=base.layout,
        machine=attrs.evolve(machine, speeds=read_speeds(machine)),
        weights=base.weights,
        work=lambda asked: rows.sample.workload(asked) if rows else None,
    )
    choice = choose(question, compare=compare)
    contents = base.contents() | (rows.contents() if rows else {}) | _start(contract)
    plan = ExecutionPlan(
        contract=contract,
        layout=base.layout,
        backend=choice.backend.name,
        execution_kernel=choice.offer.kernel,
        runbook_kernel=LABELS[contract.adapter.method],
        candle_compat_mode=contract.adapter.method == "qlora",
        contract_digest=contract.digest(contents),
        model_name=base.name,
        model_dir=base.folder,
        tokenizer=base.tokenizer,
        chat=base.encoder.chat.name,
        tokenizer_file=base.tokenizer_file if base.tokenizer == "hf" else None,
        train_file=rows.files.train if rows else None,
        eval_file=rows.files.held_out if rows else None,
        device=choice.offer.device,
        dtype=choice.offer.dtype,
        contents=contents,
        weights=base.weights,
        coverage=base.coverage,
        workload=question.work(contract),
        lengths=rows.sample.fitted(contract.data)[1].as_dict() if rows else None,
        limit_bytes=choice.limit_bytes,
        offers=choice.offers,
        not_taken=choice.not_taken,
        decided=_decided(base, choice, question),
        gates=(*asked, *base.gates, *(rows.gates if rows else ()), *choice_gates(choice)),
        preflight=preflight,
        warnings=(*_warnings(base, rows), *_overlong(contract, rows), *_outdated_speed(choice.offer, machine)),
    )
    further = choice.backend.gates(contract, plan)
    refuse_failed(further)
    return attrs.evolve(plan, gates=(*plan.gates, *further))


def _contract(
    contract: FineTuneContract | None, config: str | Path | None, preset: str | None, fields: Mapping[str, Any]
) -> FineTuneContract:
    if contract is None:
        return build_contract(("call", fields), config=config, preset=preset)
    given = [*fields, *(name for name, value in (("config", config), ("preset", preset)) if value is not None)]
    if given:
        raise ContractError(
            f"give a contract or what makes one, not both (got {', '.join(given)})",
            fix='contract.changed("call", field=value)',
        )
    return contract


def _decided(base: Base, choice: Choice, question: Question) -> dict[str, Any]:
    """What the planner filled in where ``auto`` or nothing was asked for."""
    contract, work = question.contract, question.work(question.contract)
    compute, method = contract.compute, contract.adapter.method
    filled: dict[str, tuple[object, Any]] = {
        "model": (contract.model.model, base.name),
        "tokenizer": (contract.model.tokenizer, base.tokenizer),
        "base_quant": (contract.quant.base_quant, "nf4" if method == "qlora" else "none"),
        "backend": (compute.backend, choice.backend.name),
        "kernel": (compute.kernel, choice.offer.kernel),
        "device": (compute.device, choice.offer.device),
        "dtype": (compute.dtype, choice.offer.dtype),
        "max_memory": (compute.max_memory, choice.limit_bytes),
    }
    if work:
        warmup = warmup_for(work.steps, contract.training.warmup_steps)
        filled["warmup_steps"] = (contract.training.warmup_steps, warmup)
    return {name: value for name, (asked, value) in filled.items() if asked in {None, "auto"}}


def _preflight(contract: FineTuneContract, base: Base, rows: Rows | None) -> tuple[GateVerdict, ...]:
    """What a run must find right, see ``mens_core.preflight``; the strict rules refuse the plan as well."""
    if contract.quant.qlora_require_full_proxy_stack:
        refuse_failed((strict_proxy_stack(base.layout, base.inventory),))
    saved = contract.adapter.modules_to_save
    return (
        *fitting_tensors(base.layout, base.inventory),
        rotary_pairs(base.layout),
        # Of a family the core does not know, it knows the linear layers by guess only.
        *((existing_targets(contract.adapter.targets, base.inventory.linears),) if base.layout.family else ()),
        *((matching_patterns(contract.adapter, base.inventory.linears),) if _judges_patterns(contract, base) else ()),
        *((whole_modules_exist(saved, base.layout, base.inventory.linears),) if saved else ()),
        *((start_fits(contract.adapter, base.layout, base.inventory.linears),) if contract.adapter.start_from else ()),
        *((readable_rows(rows.sample),) if rows and contract.data.on_bad_row == "error" else ()),
        *((finite_weights(TensorFolder(base.inventory)),) if contract.model.scan_weights else ()),
    )


def _judges_patterns(contract: FineTuneContract, base: Base) -> bool:
    return contract.adapter.has_patterns and base.layout.family is not None


def _start(contract: FineTuneContract) -> dict[str, str]:
    """Sha256 of the adapter that the run goes on from."""
    start = contract.adapter.start_from
    return {} if start is None else {"start_adapter": sha256_file(weights_of(start))}


def _outdated_speed(offer: KernelOffer, machine: Machine) -> tuple[str, ...]:
    """Why a speed that was measured for the chosen kernel was not used; nothing if it was, or there is none."""
    found = outdated_speeds(machine).get(f"{offer.kernel} {offer.device} {offer.dtype}")
    return () if found is None else (found,)


def _warnings(base: Base, rows: Rows | None) -> tuple[str, ...]:
    chat = base.encoder.chat
    unlearnt = rows is not None and rows.sample.reasoning and not chat.keeps_reasoning
    return (
        *chat.notes,
        *(("the chat template writes no reasoning, so that of the rows is not learnt",) if unlearnt else ()),
        *coverage_warning(base.layout, base.inventory, base.coverage),
    )


def _overlong(contract: FineTuneContract, rows: Rows | None) -> tuple[str, ...]:
    """What the length will cost, where a sample shows that it costs something."""
    if rows is None:
        return ()
    _, ledger = rows.sample.fitted(contract.data)
    lost = ledger.total
    if not lost.rows_overlong:
        return ()
    tokens = lost.supervised_tokens_cut + lost.supervised_tokens_dropped
    which = f"{lost.rows_overlong / lost.rows:.1%} of the rows are longer than {ledger.seq_len} tokens"
    cost = f"--on-overlong {contract.data.on_overlong} loses {tokens / max(1, lost.supervised_tokens):.1%}"
    return (f"{which} (the longest: {ledger.longest}); {cost} of the supervised tokens, by {rows.sample.source}",)
