"""What is asked for: the one description of a run that flags, presets, files and library calls all produce.

    FineTuneContract
    ├── model       which base, which tokenizer
    ├── provenance  where the base comes from
    ├── data        which rows, how long
    ├── adapter     which method, which matrices, how wide
    ├── quant       how the frozen base is stored
    ├── training    how long, how fast, from which seed
    ├── compute     which backend, device and number format, how much memory
    ├── checkpoint  what is kept while it runs, when it stops, how it goes on
    └── output      where the run directory goes, what the adapter is for

The fields are in ``mens_core.sections``. They are given flat, in layers of which a later one wins; the contract
remembers for each value which layer it came from. A contract is closed: an unknown field is an error that names the
nearest one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core.errors import ContractError
from mens_core.sections import (
    METHODS,
    AdapterSpec,
    CheckpointSpec,
    ComputeSpec,
    DataSpec,
    ModelSpec,
    OutputSpec,
    ProvenanceSpec,
    QuantSpec,
    TrainingSpec,
)

__all__ = [
    "LABELS",
    "METHODS",
    "RETIRED",
    "SECTIONS",
    "FineTuneContract",
    "Layer",
    "contract_fields",
    "kernel_parts",
]

Layer = tuple[str, Mapping[str, Any]]
"""Where values come from, for people, and the values by field name."""

LABELS = {"lora": "burn_lora", "qlora": "candle_qlora"}
"""Method → the kernel's name in the acceptance runbook."""

# Spellings of the older system's command line for its two kernels.
_LABEL_SPELLINGS = {
    **dict.fromkeys(("lora", "burn", "burn-lora", "burn_lora"), "burn_lora"),
    **dict.fromkeys(("qlora", "candle", "candle-qlora", "candle_qlora"), "candle_qlora"),
}

RETIRED = {
    "hf_repo": "give it as model",
    "weight_shards": "model names the folder; its index names the shards",
    "config_json": "model names the folder that holds it",
    "train_file": "data_dir names the folder; training_contract.yaml in it may name another file",
    "tokenizer_mode": "give it as tokenizer",
    "lr": "give it as learning_rate",
    "resume_from": "give it as resume",
    "qlora_max_skip_rate": "give it as max_skip_rate",
    "qlora_lm_head_only": "the whole graph is trained; choose layers with targets",
    "qlora_proxy_max_layers": "the whole graph is trained; choose layers with targets",
    "qlora_ce_last_k": "every assistant turn is supervised",
    "curriculum_schedule": "the order of the rows is the seed's",
    "adapter_schema_version": "it is always 3",
    "allow_placeholder_attention_merge": "there is no placeholder; a merge is exact",
    "collateral_damage_verified": "nothing acts on it",
}
"""Fields of the older system's contract under other names, or without a counterpart, and what to do instead."""


@attrs.frozen(kw_only=True)
class FineTuneContract:
    """What is asked for, complete and checked.

    Invariants: every field passed its own check; the sections contain no other fields; equal contracts
    describe the same run.

    Attributes:
        origins: field → where its value came from, for every field that was given; the others are defaults.
    """

    model: ModelSpec
    provenance: ProvenanceSpec
    data: DataSpec
    adapter: AdapterSpec
    quant: QuantSpec
    training: TrainingSpec
    compute: ComputeSpec
    checkpoint: CheckpointSpec
    output: OutputSpec
    origins: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_fields(cls, *, trains: bool = True, **given: Any) -> FineTuneContract:
        """Build a contract from flat field names, reporting every problem at once.

        Args:
            trains: whether data and output folder are required; generation needs neither.
            **given: field name → value; ``backend`` may be a method's, a kernel's or a runbook label's name.

        Raises:
            ContractError: listing each unknown, missing, malformed or contradictory field.
        """
        return cls.from_layers([("call", given)], trains=trains)

    @classmethod
    def from_layers(cls, layers: list[Layer], *, trains: bool = True) -> FineTuneContract:
        """Build a contract from layers of flat field names; of two that give a field the later one wins.

        Raises:
            ContractError: as ``from_fields`` does; a problem says which layer its value came from.
        """
        given = {name: value for _, values in layers for name, value in values.items()}
        origins = {name: source for source, values in layers for name in values}
        known = {field.name: (section, field) for section, field in contract_fields()}
        problems = [_unknown(name, known, origins[name]) for name in given if name not in known]
        values = {name: _converted(known[name][1], value) for name, value in given.items() if name in known}
        values, origins = _with_kernel(values, origins)
        for name, (_, field) in known.items():
            value = values.get(name, field.default)
            problem = field.metadata["check"](value)
            problems += [f"{name} {problem} (got {value!r}{_from(origins.get(name))})"] if problem else []
            problems += [f"{name} is required"] if trains and value is None and field.metadata.get("required") else []
        problems += _contradictions(values)
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise ContractError(f"the contract has {count}:\n{listing}", fix="python -m mens_core train --help")
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for name, value in values.items():
            sections[known[name][0]][name] = value
        return cls(
            **{name: SECTIONS[name](**chosen) for name, chosen in sections.items()},
            origins={name: source for name, source in origins.items() if name in values},
        )

    def as_fields(self) -> dict[str, Any]:
        """The inverse of ``from_fields``: flat names to values, paths as text, ready for JSON."""
        flat: dict[str, Any] = {}
        for section, field in contract_fields():
            value = getattr(getattr(self, section), field.name)
            if field.metadata.get("pairs"):
                flat[field.name] = dict(value)
            else:
                flat[field.name] = (
                    str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
                )
        return flat

    def changed(self, source: str, **fields: Any) -> FineTuneContract:
        """The same contract with other values for some fields.

        Raises:
            ContractError: as ``from_fields`` does.
        """
        kept = [(self.origins[name], {name: value}) for name, value in self.as_fields().items() if name in self.origins]
        return type(self).from_layers([*kept, (source, fields)], trains=self.data.data_dir is not None)

    def digest(self, contents: Mapping[str, str]) -> str:
        """Sha256, as hexadecimal text, over what determines the result.

        Paths do not enter, the contents they lead to do, so the digest is the same on every machine.

        Args:
            contents: name → sha256 of each input file (data, config.json, tokenizer, weight headers).
        """
        places = {field.name for _, field in contract_fields() if not field.metadata["digest"]}
        # Keys are sorted below, but the order of patterns says which of them counts.
        asked = {
            name: [*value.items()] if isinstance(value, dict) else value
            for name, value in self.as_fields().items()
            if name not in places
        }
        body = {"format": "mens.contract.v2", "fields": asked, "contents": dict(contents)}
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSpec,
    "provenance": ProvenanceSpec,
    "data": DataSpec,
    "adapter": AdapterSpec,
    "quant": QuantSpec,
    "training": TrainingSpec,
    "compute": ComputeSpec,
    "checkpoint": CheckpointSpec,
    "output": OutputSpec,
}
"""Name of each section → its class, in order."""


def contract_fields() -> Iterator[tuple[str, attrs.Attribute[Any]]]:
    """Yield (section, field) for every field of the contract, in order."""
    for section, spec in SECTIONS.items():
        for field in attrs.fields(spec):
            yield section, field


def kernel_parts(kernel: str) -> tuple[str, str] | None:
    """Split a kernel id ``<backend>_<method>``; None if it is not one."""
    backend, _, method = kernel.rpartition("_")
    return (backend, method) if backend and method in METHODS else None


def _with_kernel(values: dict[str, Any], origins: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a backend that is spelled as a method, a label or a kernel: it fixes ``kernel``, and with it the rest.

    What was given beside it is left alone; a gate of the planner compares the two.
    """
    spelled = values.get("backend") or values.get("kernel")
    if not isinstance(spelled, str):
        return values, origins
    word = spelled.strip().lower()
    label, parts = _LABEL_SPELLINGS.get(word), kernel_parts(word)
    if label is not None:
        read = {"backend": "auto", "kernel": label, "method": label.partition("_")[2]}
    elif parts is not None:
        read = {"backend": parts[0], "kernel": word, "method": parts[1]}
    else:
        return values, origins
    source = origins["backend" if values.get("backend") else "kernel"]
    given = {name: value for name, value in values.items() if name not in {"backend", "kernel"} and value is not None}
    given |= {"kernel": values["kernel"]} if values.get("kernel") and values.get("backend") else {}
    return read | given, dict.fromkeys(read, source) | {name: origins[name] for name in given}


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What no field shows by itself; the values may still be of any kind."""
    problems = []
    block = values.get("block_size")
    if isinstance(block, int) and block > 0 and block & (block - 1):
        problems.append(f"block_size must be a power of two (got {block})")
    if values.get("qlora_require_full_proxy_stack") is True and values.get("qlora_allow_partial_proxy_stack") is True:
        problems.append("qlora_require_full_proxy_stack and qlora_allow_partial_proxy_stack contradict each other")
    return problems


def _unknown(name: str, known: Mapping[str, object], source: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = RETIRED.get(name) or (f"did you mean {close[0]}?" if close else None)
    return f"{name} is not a field{_from(source)}" + (f"; {hint}" if hint else "")


def _from(source: str | None) -> str:
    """Where a value came from, unless the call itself shows it."""
    return f", from {source}" if source not in {None, "call"} else ""


def _converted(field: attrs.Attribute[Any], value: Any) -> Any:
    """Accept a value's harmless spellings: text for a path or a size, a list or mapping for a tuple, int for float."""
    parse = field.metadata["parse"]
    if field.metadata.get("pairs") and isinstance(value, Mapping):
        whole = field.metadata["kind"] is int
        return tuple((name, float(part) if type(part) is int and not whole else part) for name, part in value.items())
    if parse is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and isinstance(field.default, tuple) and all(isinstance(part, str) for part in value):
        value = ",".join(value)
    if isinstance(value, str) and field.metadata.get("as_text"):
        try:
            return parse(value)
        except ValueError:
            return value  # its check says what it should have been
    return field.metadata.get("aliases", {}).get(value, value) if isinstance(value, str) else value
