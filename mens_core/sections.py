"""The sections of a contract: every field that a run can be asked with.

Every field carries its unit, range, help and evidence in its attrs metadata (see ``mens_core.fields``); the command
line, the configuration page and the checks are made from them. Field names are unique over all sections.
"""

from __future__ import annotations

from pathlib import Path

import attrs

from mens_core import fields
from mens_core.adapter_section import METHODS, AdapterSpec

__all__ = [
    "METHODS",
    "AdapterSpec",
    "CheckpointSpec",
    "ComputeSpec",
    "DataSpec",
    "ModelSpec",
    "OutputSpec",
    "ProvenanceSpec",
    "QuantSpec",
    "TrainingSpec",
]


@attrs.frozen(kw_only=True)
class ModelSpec:
    """The base model and its tokenizer."""

    model: str | None = fields.text(
        None,
        "Base model: a Hugging Face folder on disk, or a hub id. Without it the bundled lab base is used.",
        metavar="DIR|ID",
        digest=False,
    )
    revision: str | None = fields.text(None, "Commit, tag or branch of a hub id.", digest=False)
    tokenizer: str = fields.choice(
        "auto",
        ("auto", "hf", "lab"),
        "hf reads the model's tokenizer.json; lab is the bundled reversible byte tokenizer (vox is an alias); "
        "auto is hf for a given model and lab for the lab base.",
        aliases={"vox": "lab"},
    )
    tokenizer_json: Path | None = fields.path(
        "tokenizer.json to use instead of the one in the model's folder.", metavar="FILE", digest=False
    )
    scan_weights: bool = fields.switch(
        False,
        "Read every weight before the run and refuse NaN and infinity by name; loading refuses them anyway, but later.",
        digest=False,
    )


@attrs.frozen(kw_only=True)
class ProvenanceSpec:
    """Where the base comes from and on which terms; kept in the manifest and the model card."""

    base_family: str | None = fields.text(None, "Family of the base, such as qwen2.5.", flag="--base-model-family")
    upstream_model_id: str | None = fields.text(None, "Id under which the base was published.")
    license_class: str | None = fields.text(None, "Licence of the base, such as apache-2.0.")
    attribution_required: bool = fields.switch(False, "The licence of the base asks for attribution.")


@attrs.frozen(kw_only=True)
class DataSpec:
    """The rows and how they become token rows."""

    data_dir: Path | None = fields.path(
        "Folder that holds train.jsonl and, if there is a held-out part, eval.jsonl; a training_contract.yaml in it "
        "may name others.",
        metavar="DIR",
        required=True,
        digest=False,
    )
    seq_len: int = fields.integer(
        1024, "Longest row.", low=8, unit="tokens", evidence="the default of TRL's SFTConfig; nothing is padded to it"
    )
    on_overlong: str = fields.choice(
        "auto",
        ("auto", "drop", "truncate", "split", "error"),
        "What becomes of a row longer than seq-len: auto drops it, but refuses to lose more than 5 % of the rows; "
        "split makes several rows of it. Every case is counted by source, reported and kept in the manifest.",
    )
    truncation_side: str = fields.choice(
        "right", ("right", "left"), "Where on-overlong truncate cuts a row: right keeps its start, left its end."
    )
    supervise: str = fields.pattern(
        "all-assistant",
        r"all-assistant|last-assistant|suffix-[1-9][0-9]*",
        "What is trained on: all-assistant, every turn of the assistant with its end of turn; last-assistant, the last "
        "one alone; suffix-K, the last K of these tokens in a row. Prompts, system texts and tools' answers never are.",
        metavar="all-assistant|last-assistant|suffix-K",
    )
    on_bad_row: str = fields.choice(
        "error",
        ("error", "skip"),
        "What becomes of a row that cannot be used: error refuses the file, with every kind of fault and its first "
        "lines; skip leaves it out, but not more than max-skip-rate allows, or 5 % of the rows without one.",
    )
    min_rating: int | None = fields.integer(
        None, "Leave out rows rated lower than this; rows without a rating stay.", low=1, high=5
    )
    context_filter: str | None = fields.text(
        None, "Keep only rows whose category, lane or task_family contains this, in any case of letters."
    )
    min_rows: int = fields.integer(1, "Refuse to train on fewer rows than this.", low=1, unit="rows")
    max_skip_rate: float | None = fields.number(
        None,
        "Largest share of the rows that may be left out, for whatever reason; without it too long and faulty rows "
        "alone are limited, see on-overlong and on-bad-row.",
        low=0.0,
        high=1.0,
        flag="--qlora-max-skip-rate",
    )


@attrs.frozen(kw_only=True)
class QuantSpec:
    """How the frozen base is stored."""

    base_quant: str = fields.choice(
        "auto",
        ("auto", "none", "nf4"),
        "auto is nf4 for qlora and none for lora; what contradicts the method is refused.",
    )
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
    qlora_require_full_proxy_stack: bool = fields.switch(
        False,
        "Refuse a base that lacks the attention output projection of any layer, with the list of what is missing.",
    )
    qlora_allow_partial_proxy_stack: bool = fields.switch(
        False, "State that a plan for such a base is wanted all the same; contradicts the flag above."
    )


@attrs.frozen(kw_only=True)
class TrainingSpec:
    """How long, how fast, from which seed."""

    epochs: int = fields.integer(3, "Passes over the rows.", low=1)
    max_steps: int | None = fields.integer(None, "Stop after this many optimizer steps.", low=1, unit="steps")
    batch_size: int = fields.integer(
        4,
        "Rows in one forward pass, or bins of seq-len tokens with packing; they lie end to end, nothing is padded.",
        low=1,
        unit="rows",
    )
    packing: str = fields.choice(
        "none",
        ("none", "best-fit"),
        "none takes batch-size rows as they come; best-fit first puts whole rows into bins of seq-len tokens, so that "
        "every batch is about as large. No row sees another either way.",
        evidence="best-fit packing truncates nothing (Ding et al. 2024, arXiv:2404.10830)",
    )
    grad_accum: int = fields.integer(4, "Forward passes that share one optimizer step.", low=1, unit="batches")
    gradient_checkpointing: bool = fields.switch(
        False,
        "Keep only what goes into each layer for the backward pass, and compute the layer again: less memory, and at "
        "most a forward pass more of time. Without it torch keeps what every layer makes, and JAX keeps its products "
        "unless they take more than 1 GiB and more than the base.",
        evidence="Chen et al. 2016, arXiv:1604.06174; gradients are the same",
    )
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
    on_non_finite: str = fields.choice(
        "stop",
        ("stop", "skip-window"),
        "What happens where a loss or gradient is not finite: stop fails the run; skip-window leaves the adapter as it "
        "was, counts the window and goes on, unless more than a tenth of the run's windows or ten in a row are so.",
    )
    seed: int = fields.integer(42, "Seeds the adapter's start, the order of the rows and dropout.", low=0)
    eval_every: int | None = fields.integer(
        None,
        "Measure the held-out loss after every so many optimizer steps, beside before the first and after the last; "
        "the checkpoint of the lowest one is kept.",
        low=1,
        unit="steps",
    )
    early_stopping_patience: int | None = fields.integer(
        None,
        "End after so many held-out losses in a row that are not below the lowest; the adapter is then that of the "
        "lowest one, and not of the last step, however the run ended. Needs eval-every.",
        low=1,
        unit="evaluations",
    )
    early_stopping_min_delta: float = fields.number(
        0.0, "By how much a held-out loss has to be below the lowest to count as lower.", low=0.0, unit="nats a token"
    )


@attrs.frozen(kw_only=True)
class ComputeSpec:
    """Where the mathematics runs."""

    backend: str = fields.text(
        "auto",
        "auto takes the first that can do the run (torch, jax, then others); torch, jax or an installed plugin "
        "is forced; lora and qlora name the method and leave the backend open; torch_qlora and the like force both.",
        metavar="NAME",
    )
    kernel: str | None = fields.text(
        None,
        "Refuse the run unless the plan comes to this kernel: torch_lora, jax_qlora and the like, or one of the "
        "runbook's labels burn_lora and candle_qlora. A kernel or label given as --backend sets it.",
        metavar="NAME",
        digest=False,
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
    certify: bool = fields.switch(
        False,
        "Before training, hold the kernel to the specification in float64 and to every other installed backend, "
        "in float32 on the run's base, or on a tiny model of its family where the base is too large; the run is "
        "refused if a comparison fails, and keeps the certificate as parity.json.",
        digest=False,
    )
    max_memory: int | None = fields.size(
        None, "Most memory the run may need on its device; a plan that needs more is refused.", digest=False
    )
    max_vram_fraction: float = fields.number(
        1.0,
        "The same as a share of the device's memory.",
        low=0.0,
        high=1.0,
        exclusive=True,
        flag="--vram-limit-fraction",
        digest=False,
    )


@attrs.frozen(kw_only=True)
class CheckpointSpec:
    """What is kept while a run goes on, when it stops, and how it goes on."""

    checkpoint_every: int = fields.integer(
        100,
        "Save a checkpoint after every so many optimizer steps, at the end of every epoch and after the last step; "
        "with 0 only where the run is stopped, or where eval-every finds the lowest held-out loss.",
        low=0,
        unit="steps",
        digest=False,
    )
    keep_checkpoints: int = fields.integer(
        2, "The newest checkpoints that are kept, beside the one of the lowest held-out loss.", low=1, digest=False
    )
    max_time: float | None = fields.duration(
        "Stop after this time, once the step that goes on then is done, and save a checkpoint: 90s, 30m, 2h. Counted "
        "anew each time the run goes on.",
        digest=False,
    )
    resume: str = fields.text(
        "never",
        "never refuses an output folder that holds a run; auto goes on from its newest checkpoint that is whole, and "
        "begins where there is none; a path goes on from that checkpoint, or from the newest one of that run.",
        metavar="auto|never|PATH",
        digest=False,
    )
    resume_anyway: bool = fields.switch(
        False,
        "Go on although the contract differs, where it differs in what leaves the steps to come the same, such as the "
        "backend, but for rounding.",
        digest=False,
    )


@attrs.frozen(kw_only=True)
class OutputSpec:
    """Where the run directory goes."""

    output_dir: Path | None = fields.path(
        "Folder of the run; it must not hold an earlier run.", metavar="DIR", required=True, digest=False
    )
    report_to: tuple[str, ...] = fields.names(
        ("none",),
        "Show the run elsewhere as well: none, or a comma-separated list of tensorboard, wandb, mlflow and installed "
        "observers. Nothing is sent anywhere unless asked for here.",
        metavar="NAMES",
        digest=False,
    )
    overwrite: bool = fields.switch(False, "Replace an earlier run in the output folder.", digest=False)
    deployment_target: str = fields.choice(
        "workstation",
        ("workstation", "mobile_edge"),
        "mobile_edge keeps the run within what a small device can serve: on the CPU, rows of at most 512 tokens, "
        "rank at most 32, one row in a batch.",
    )
