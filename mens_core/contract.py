"""What is asked for: the one description of a run that flags, presets and library calls all produce.

    FineTuneContract
    ├── model      which base, which tokenizer
    ├── data       which rows, how long
    ├── adapter    which method, which matrices, how wide
    ├── quant      how the frozen base is stored by QLoRA
    ├── training   how long, how fast, from which seed
    ├── compute    which backend, device and number format
    └── output     where the run directory goes

Every field carries its unit, range, help and evidence in its attrs metadata; the command line is generated
from them, so there is one source. Field names are unique over all sections, hence ``from_fields`` takes
them flat. A contract is closed: an unknown field is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mens_core import fields
from mens_core.errors import ContractError

__all__ = [
    "METHODS",
    "AdapterSpec",
    "ComputeSpec",
    "DataSpec",
    "FineTuneContract",
    "ModelSpec",
    "OutputSpec",
    "QuantSpec",
    "TrainingSpec",
    "contract_fields",
    "kernel_parts",
    "resolve_backend",
]

METHODS = ("lora", "qlora")

# Spellings of the older system's command line; each is a method here, the backend is then chosen by the planner.
_METHOD_SPELLINGS = {
    "lora": "lora",
    "burn": "lora",
    "burn-lora": "lora",
    "burn_lora": "lora",
    "qlora": "qlora",
    "candle": "qlora",
    "candle-qlora": "qlora",
    "candle_qlora": "qlora",
}


@attrs.frozen(kw_only=True)
class ModelSpec:
    """The base model and its tokenizer."""

    model: str | None = fields.text(
        None,
        "Base model: a Hugging Face folder on disk, or a hub id. Without it the bundled lab base is used.",
        metavar="DIR|ID",
    )
    revision: str | None = fields.text(None, "Commit, tag or branch of a hub id.")
    tokenizer: str = fields.choice(
        "auto",
        ("auto", "hf", "lab"),
        "hf reads the model's tokenizer.json; lab is the bundled reversible byte tokenizer (vox is an alias); "
        "auto is hf for a given model and lab for the lab base.",
        aliases={"vox": "lab"},
    )


@attrs.frozen(kw_only=True)
class DataSpec:
    """The rows and how they become token rows."""

    data_dir: Path | None = fields.folder("Folder that holds train.jsonl and, if there is a held-out part, eval.jsonl.")
    seq_len: int = fields.integer(
        1024, "Longest row.", low=8, unit="tokens", evidence="the default of TRL's SFTConfig; nothing is padded to it"
    )
    on_overlong: str = fields.choice(
        "auto",
        ("auto", "drop", "truncate", "error"),
        "What becomes of a row longer than seq-len: auto drops it, but refuses to lose more than 5 % of the rows. "
        "Every case is counted, reported and kept in the manifest.",
    )

    @property
    def train_file(self) -> Path:
        """The rows to train on."""
        return self._file("train.jsonl")

    @property
    def eval_file(self) -> Path:
        """The held-out rows; the file need not exist."""
        return self._file("eval.jsonl")

    def _file(self, name: str) -> Path:
        if self.data_dir is None:
            raise ContractError("data_dir is required", fix="python -m mens_core train --help")
        return self.data_dir / name


@attrs.frozen(kw_only=True)
class AdapterSpec:
    """The adapter: y = x Wᵀ + s · (x Aᵀ) Bᵀ."""

    method: str = fields.choice(
        "lora",
        METHODS,
        "lora keeps the base in the compute type; qlora stores it in NF4 (4.127 bits a weight).",
    )
    rank: int = fields.integer(
        16,
        "Rank of the update.",
        low=1,
        evidence="rank is not the bottleneck at this size (Schulman et al. 2025, LoRA Without Regret)",
    )
    alpha: float = fields.number(
        32.0,
        "Numerator of the scale s = alpha / rank.",
        low=0.0,
        exclusive=True,
        evidence="alpha = 2 * rank, as in PEFT's and the QLoRA authors' recipes",
    )
    rslora: bool = fields.switch(
        False, "Scale by alpha / sqrt(rank) instead.", evidence="Kalajdzievski 2023, arXiv:2312.03732"
    )
    targets: tuple[str, ...] = fields.names(
        ("all-linear",),
        "Linear layers to adapt: all-linear, or a comma-separated list of module names such as q_proj,v_proj.",
        metavar="NAMES",
        evidence="adapting all layers matches full fine-tuning (Dettmers et al. 2023, section 4)",
    )

    @property
    def scale(self) -> float:
        """The factor s, dimensionless."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@attrs.frozen(kw_only=True)
class QuantSpec:
    """How QLoRA stores the frozen base."""

    block_size: int = fields.integer(
        64,
        "Weights that share one scale; a power of two from 32 to 4096.",
        low=32,
        high=4096,
        unit="weights",
        evidence="Dettmers et al. 2023, section 3",
    )
    double_quant: bool = fields.switch(
        True,
        "Keep the scales themselves in full precision instead of 8 bits.",
        flag="--qlora-no-double-quant",
        evidence="saves 0.373 bits a weight (Dettmers et al. 2023, section 3)",
    )


@attrs.frozen(kw_only=True)
class TrainingSpec:
    """How long, how fast, from which seed."""

    epochs: int = fields.integer(3, "Passes over the rows.", low=1)
    max_steps: int | None = fields.integer(None, "Stop after this many optimizer steps.", low=1, unit="steps")
    batch_size: int = fields.integer(
        4, "Rows in one forward pass; they are packed end to end, not padded.", low=1, unit="rows"
    )
    grad_accum: int = fields.integer(4, "Forward passes that share one optimizer step.", low=1, unit="batches")
    learning_rate: float = fields.number(
        2e-4,
        "Peak learning rate.",
        low=0.0,
        exclusive=True,
        flag="--lr",
        evidence="Dettmers et al. 2023, table 9; about ten times that of full fine-tuning",
    )
    schedule: str = fields.choice(
        "cosine",
        ("constant", "linear", "cosine"),
        "Course of the learning rate after warm-up; it falls to zero.",
    )
    warmup_steps: int | None = fields.integer(
        None,
        "Steps over which the rate rises to its peak; 3 % of the run when not given.",
        low=0,
        unit="steps",
        flag="--warmup",
        evidence="Dettmers et al. 2023, appendix B.2",
    )
    weight_decay: float = fields.number(0.0, "Decoupled weight decay of the adapter.", low=0.0)
    max_grad_norm: float = fields.number(
        1.0,
        "Gradients are scaled down to this global norm.",
        low=0.0,
        exclusive=True,
        evidence="the default of transformers' Trainer",
    )
    seed: int = fields.integer(42, "Seeds the adapter's start and the order of the rows.", low=0)


@attrs.frozen(kw_only=True)
class ComputeSpec:
    """Where the mathematics runs."""

    backend: str = fields.text(
        "auto",
        "auto takes the first that can do the run (torch, jax, then others); torch, jax or an installed plugin "
        "is forced; lora and qlora name the method and leave the backend open; torch_qlora and the like force both.",
        metavar="NAME",
    )
    device: str = fields.text(
        "auto", "auto, cpu, cuda or cuda:N; auto is the accelerator if there is one.", metavar="NAME"
    )
    dtype: str = fields.choice(
        "auto",
        ("auto", "float32", "bfloat16"),
        "Number format of the frozen base and the activations; auto is float32 on a CPU and bfloat16 on an "
        "accelerator. The adapter and its optimizer are always float32.",
    )


@attrs.frozen(kw_only=True)
class OutputSpec:
    """Where the run directory goes."""

    output_dir: Path | None = fields.folder("Folder of the run; it must not hold an earlier run.")
    overwrite: bool = fields.switch(False, "Replace an earlier run in the output folder.")


@attrs.frozen(kw_only=True)
class FineTuneContract:
    """What is asked for, complete and checked.

    Invariants: every field passed its own check; the sections contain no other fields; equal contracts
    describe the same run.
    """

    model: ModelSpec
    data: DataSpec
    adapter: AdapterSpec
    quant: QuantSpec
    training: TrainingSpec
    compute: ComputeSpec
    output: OutputSpec

    @classmethod
    def from_fields(cls, *, trains: bool = True, **given: Any) -> FineTuneContract:
        """Build a contract from flat field names, reporting every problem at once.

        Args:
            trains: whether data and output folder are required; generation needs neither.
            **given: field name → value; ``backend`` may be a method's or a kernel's name (``resolve_backend``).

        Raises:
            ContractError: listing each unknown, missing, malformed or contradictory field.
        """
        known = {field.name: (section, field) for section, field in contract_fields()}
        problems = [_unknown(name, known) for name in given if name not in known]
        values = {name: _converted(known[name][1], value) for name, value in given.items() if name in known}
        if isinstance(values.get("backend"), str):
            try:
                values["backend"], method = resolve_backend(values["backend"], values.get("method"))
            except ContractError as error:
                problems.append(error.what)
            else:
                values |= {"method": method} if method else {}
        for name, (_, field) in known.items():
            value = values.get(name, field.default)
            problem = field.metadata["check"](value)
            problems += [f"{name} {problem} (got {value!r})"] if problem else []
            problems += [f"{name} is required"] if trains and value is None and field.metadata.get("required") else []
        block = values.get("block_size", 64)
        if isinstance(block, int) and block > 0 and block & (block - 1):
            problems.append(f"block_size must be a power of two (got {block})")
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise ContractError(f"the contract has {count}:\n{listing}", fix="python -m mens_core train --help")
        sections: dict[str, dict[str, Any]] = {field.name: {} for field in attrs.fields(cls)}
        for name, value in values.items():
            sections[known[name][0]][name] = value
        return cls(**{name: _SECTIONS[name](**chosen) for name, chosen in sections.items()})

    def as_fields(self) -> dict[str, Any]:
        """The inverse of ``from_fields``: flat names to values, paths as text, ready for JSON."""
        flat: dict[str, Any] = {}
        for section, field in contract_fields():
            value = getattr(getattr(self, section), field.name)
            flat[field.name] = (
                str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            )
        return flat

    def digest(self, contents: Mapping[str, str]) -> str:
        """Sha256, as hexadecimal text, over what determines the result.

        Paths do not enter, the contents they lead to do, so the digest is the same on every machine.

        Args:
            contents: name → sha256 of each input file (data, config.json, tokenizer, weight headers).
        """
        places = {"model", "revision", "data_dir", "output_dir", "overwrite"}
        asked = {name: value for name, value in self.as_fields().items() if name not in places}
        body = {"format": "mens.contract.v1", "fields": asked, "contents": dict(contents)}
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


_SECTIONS: dict[str, type[Any]] = {
    "model": ModelSpec,
    "data": DataSpec,
    "adapter": AdapterSpec,
    "quant": QuantSpec,
    "training": TrainingSpec,
    "compute": ComputeSpec,
    "output": OutputSpec,
}


def contract_fields() -> Iterator[tuple[str, attrs.Attribute[Any]]]:
    """Yield (section, field) for every field of the contract, in order."""
    for section, spec in _SECTIONS.items():
        for field in attrs.fields(spec):
            yield section, field


def resolve_backend(backend: str, method: str | None) -> tuple[str, str | None]:
    """Read ``--backend`` and ``--method`` together.

    ``lora`` and ``qlora`` (and the older system's spellings) name a method; ``<backend>_<method>`` names a
    kernel and so both.

    Returns:
        (backend or "auto", method or None where neither says one).

    Raises:
        ContractError: if the two contradict each other.
    """
    spelled = backend.strip().lower()
    if spelled in _METHOD_SPELLINGS:
        name, named = "auto", _METHOD_SPELLINGS[spelled]
    elif (parts := kernel_parts(spelled)) is not None:
        name, named = parts
    else:
        return backend.strip(), method
    if method is not None and method != named:
        raise ContractError(
            f"backend {backend!r} means method {named!r}, but method {method!r} is asked for as well",
            fix="give one of the two",
        )
    return name, named


def kernel_parts(kernel: str) -> tuple[str, str] | None:
    """Split a kernel id ``<backend>_<method>``; None if it is not one."""
    backend, _, method = kernel.rpartition("_")
    return (backend, method) if backend and method in METHODS else None


def _unknown(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name} is not a field" + (f"; did you mean {close[0]}?" if close else "")


def _converted(field: attrs.Attribute[Any], value: Any) -> Any:
    """Accept the harmless spellings of a value: text for a path, a list for a tuple, an int for a float."""
    parse = field.metadata["parse"]
    if parse is Path and isinstance(value, str) and value.strip():
        return Path(value)
    if parse is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and isinstance(field.default, tuple):
        return tuple(value)
    if isinstance(value, str) and isinstance(field.default, tuple):
        return parse(value)
    return field.metadata.get("aliases", {}).get(value, value) if isinstance(value, str) else value
