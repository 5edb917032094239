"""LoRA and QLoRA fine-tuning of Hugging Face causal language models on exchangeable compute backends.

    from mens_core import Planner

    result = Planner().run(data_dir="corpus", output_dir="run", method="lora", backend="auto")

Names are resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # Type checkers know the name; importing typing for it would be most of this import's time.
if TYPE_CHECKING:
    from typing import Any

    from mens_core.acceptance.gate import run_gate
    from mens_core.artifacts.compare import compare_adapters
    from mens_core.artifacts.convert import convert_adapter
    from mens_core.artifacts.describe import describe_adapter
    from mens_core.certification import certify
    from mens_core.contract import FineTuneContract
    from mens_core.corpus.mix import mix
    from mens_core.corpus.pairs import write_pairs
    from mens_core.doctor import examine
    from mens_core.errors import MensError
    from mens_core.eval_gate.judge import judge_run
    from mens_core.evaluation import evaluate_model
    from mens_core.exchange import (
        Batch,
        BatchShape,
        GenerateSettings,
        NF4Spec,
        QuantizedWeight,
        StepMetrics,
        TrainingState,
    )
    from mens_core.generation import Conversation, generate
    from mens_core.hookspecs import hookimpl
    from mens_core.measuring import measure_speeds
    from mens_core.merging.merge import merge
    from mens_core.plan import BaseWeights, ExecutionPlan, GateVerdict, KernelOffer, Machine, Speed, Workload
    from mens_core.planner import Planner
    from mens_core.plugins import BackendInfo, installed_backends
    from mens_core.preview import preview_rows
    from mens_core.random_model import write_random_model
    from mens_core.training.result import RunResult
    from mens_core.verification import verify_run
    from mens_core.watching import follow_run, run_status

_HOMES = {
    "BackendInfo": "plugins",
    "BaseWeights": "plan",
    "Batch": "exchange",
    "BatchShape": "exchange",
    "Conversation": "generation",
    "ExecutionPlan": "plan",
    "FineTuneContract": "contract",
    "GateVerdict": "plan",
    "GenerateSettings": "exchange",
    "KernelOffer": "plan",
    "Machine": "plan",
    "MensError": "errors",
    "NF4Spec": "exchange",
    "Planner": "planner",
    "QuantizedWeight": "exchange",
    "RunResult": "training.result",
    "Speed": "plan",
    "StepMetrics": "exchange",
    "TrainingState": "exchange",
    "Workload": "plan",
    "certify": "certification",
    "compare_adapters": "artifacts.compare",
    "convert_adapter": "artifacts.convert",
    "describe_adapter": "artifacts.describe",
    "evaluate_model": "evaluation",
    "examine": "doctor",
    "follow_run": "watching",
    "generate": "generation",
    "hookimpl": "hookspecs",
    "installed_backends": "plugins",
    "judge_run": "eval_gate.judge",
    "measure_speeds": "measuring",
    "merge": "merging.merge",
    "mix": "corpus.mix",
    "preview_rows": "preview",
    "run_gate": "acceptance.gate",
    "run_status": "watching",
    "verify_run": "verification",
    "write_pairs": "corpus.pairs",
    "write_random_model": "random_model",
}

__all__ = [
    "BackendInfo",
    "BaseWeights",
    "Batch",
    "BatchShape",
    "Conversation",
    "ExecutionPlan",
    "FineTuneContract",
    "GateVerdict",
    "GenerateSettings",
    "KernelOffer",
    "Machine",
    "MensError",
    "NF4Spec",
    "Planner",
    "QuantizedWeight",
    "RunResult",
    "Speed",
    "StepMetrics",
    "TrainingState",
    "Workload",
    "certify",
    "compare_adapters",
    "convert_adapter",
    "describe_adapter",
    "evaluate_model",
    "examine",
    "follow_run",
    "generate",
    "hookimpl",
    "installed_backends",
    "judge_run",
    "measure_speeds",
    "merge",
    "mix",
    "preview_rows",
    "run_gate",
    "run_status",
    "verify_run",
    "write_pairs",
    "write_random_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mens_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mens_core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
