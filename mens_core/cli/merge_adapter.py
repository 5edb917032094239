"""``merge-adapter``, ``merge-qlora``, ``merge-weights``: adapter + base → a model that needs no adapter."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import mens_core
from mens_core import report
from mens_core.errors import ContractError

__all__ = ["add_arguments", "run"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge."""
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="PATH[=WEIGHT]",
        help="run directory, folder in PEFT's format, or safetensors file; given twice, the weighted sum is merged",
    )
    parser.add_argument("--meta", type=Path, metavar="FILE", help="description of an adapter of version 2 or 3")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", metavar="MODEL", help="folder or hub id of the base (default: what the adapter names)")
    base.add_argument(
        "--base-shard",
        action="append",
        type=Path,
        metavar="FILE",
        help="a safetensors file of the base, several times for several; the merged tensors alone are written",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PATH", help="folder to make, or file of a subset"
    )
    parser.add_argument(
        "--format",
        choices=("full", "subset"),
        help="full: a model folder (default); subset: the merged tensors alone, in float32 (default with --base-shard)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="format of the weights (default: as the base's)"
    )
    parser.add_argument(
        "--onto",
        choices=("original", "quantized"),
        default="original",
        help="original: the base's own weights (default); quantized: as NF4 gives them back, which a QLoRA adapter was "
        "trained on",
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4",),
        help="write the linear layers in NF4 as bitsandbytes stores it, which transformers opens as it is",
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")
    parser.add_argument("--backend", metavar="NAME", help="who computes (default: the first that is installed)")
    parser.add_argument(
        "--base-changed-anyway", action="store_true", help="merge although the base is not the one trained on"
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="rows on which the model is compared with base and adapter (default: those of the run, if they are there)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Merge and say how exactly."""
    done = mens_core.merge(
        [_weighted(word) for word in arguments.adapter],
        output=arguments.output,
        meta=arguments.meta,
        base=arguments.base_shard or arguments.base,
        method={"merge-qlora": "qlora", "merge-weights": "lora"}.get(arguments.verb),
        subset=(arguments.format or ("subset" if arguments.base_shard else "full")) == "subset",
        dtype=arguments.dtype,
        quantized=arguments.onto == "quantized",
        quantize=arguments.quantize,
        max_shard_bytes=_bytes(arguments.max_shard_size),
        backend=arguments.backend,
        base_changed_anyway=arguments.base_changed_anyway,
        held_out=arguments.held_out,
    )
    report.say(json.dumps(done, indent=2) if arguments.json else report.merge_text(arguments.output, done))
    return 0


def _weighted(word: str) -> tuple[Path, float]:
    path, sign, weight = word.rpartition("=")
    try:
        return (Path(path), float(weight)) if sign else (Path(word), 1.0)
    except ValueError:
        # The sign is part of the name.
        return Path(word), 1.0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ContractError(f"--max-shard-size is {text!r}", expected="a size such as 500MB or 5GB")
    return size
