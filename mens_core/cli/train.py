"""``train``: from rows to a complete run directory."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence

import mens_core
from mens_core import report
from mens_core.cli.flags import add_contract_flags, add_layer_flags, contract_from
from mens_core.cli.signals import EXIT_CODES, Signals
from mens_core.errors import RunInterrupted
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
  python -m mens_core train --data-dir corpus --output-dir run --resume auto
      go on where it was interrupted, to the bytes of a run that was not; exit codes: 130 after Ctrl-C, 143 after
      SIGTERM, 124 after --max-time, each with a checkpoint; 2 after an error
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train``."""
    parser.epilog = _EXAMPLES
    add_layer_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_contract_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and say where everything lies; a run that was told to stop says how it goes on."""
    contract = contract_from(arguments)
    try:
        with Signals() as signals:
            if arguments.quiet:
                mens_core.Planner().run(contract, stop=signals.stop)
                return 0
            report.say(
                f"planning {contract.adapter.method} from {contract.data.data_dir} to {contract.output.output_dir}"
            )
            with TrainingView() as view:
                result = mens_core.Planner().run(contract, observers=[view.observe], stop=signals.stop)
    except RunInterrupted as interrupted:
        report.complain(f"stopped by {interrupted.reason} after step {interrupted.step}; go on with:")
        report.complain(f"  {_resuming(arguments.words)}")
        return EXIT_CODES[interrupted.reason]
    report.say(report.run_summary(result.output_dir, result.manifest))
    return 0


def _resuming(words: Sequence[str]) -> str:
    """The command that goes on with the run that these words began."""
    return shlex.join(["python", "-m", "mens_core", *_without_start(words), "--resume", "auto"])


def _without_start(words: Sequence[str]) -> Iterator[str]:
    """The words but for those that say how the run was begun."""
    follows = False
    for word in words:
        if not follows and word not in {"--resume", "--overwrite"} and not word.startswith("--resume="):
            yield word
        follows = word == "--resume"
