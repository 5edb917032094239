"""``train``: from rows to a complete run directory."""

from __future__ import annotations

import argparse

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, add_layer_flags, contract_from
from mens_core.training_view import TrainingView

__all__ = ["add_arguments", "run"]

_EXAMPLES = """
examples:
  python -m mens_core train --data-dir corpus --output-dir run
      LoRA on the bundled lab base, on the first backend that can
  python -m mens_core train --backend qlora --tokenizer hf --model ./Qwen2.5-0.5B --data-dir corpus --output-dir run
      QLoRA (NF4) on a model of your own
  python -m mens_core train --backend jax --method lora --model ./model --data-dir corpus --output-dir run
      the same on JAX
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train``."""
    parser.epilog = _EXAMPLES
    add_layer_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_contract_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and say where everything lies."""
    contract = contract_from(arguments)
    if arguments.quiet:
        mens_core.Planner().run(contract)
        return 0
    report.say(f"planning {contract.adapter.method} from {contract.data.data_dir} to {contract.output.output_dir}")
    with TrainingView() as view:
        result = mens_core.Planner().run(contract, observers=[view.observe])
    report.say(report.run_summary(result.output_dir, result.manifest))
    return 0
