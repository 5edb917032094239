"""The section of a contract that says what is trained, see ``mens_core.sections``."""

from __future__ import annotations

import math
from pathlib import Path

import attrs

from mens_core import fields
from mens_core.patterns import number_of

__all__ = ["METHODS", "AdapterSpec"]

METHODS = ("lora", "qlora")


@attrs.frozen(kw_only=True)
class AdapterSpec:
    """The adapter: y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ, where drop is the identity but in training with dropout.

    Beside it, modules that are trained whole.
    """

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
    rank_pattern: tuple[tuple[str, int], ...] = fields.patterns(
        int,
        "Ranks of their own, as in PEFT: names or regular expressions with a rank each, such as q_proj=8,v_proj=4, in "
        "a file a mapping; the first that is a layer's path or the end of it counts.",
        metavar="NAME=RANK,…",
    )
    alpha_pattern: tuple[tuple[str, float], ...] = fields.patterns(
        float, "The same for alpha; a layer's scale is of its own alpha and its own rank.", metavar="NAME=ALPHA,…"
    )
    targets: tuple[str, ...] = fields.names(
        ("all-linear",),
        "Linear layers to adapt: all-linear, or a comma-separated list of module names such as q_proj,v_proj.",
        metavar="NAMES",
        aliases={"full_graph": "all-linear"},
        evidence="adapting all layers matches full fine-tuning (Dettmers et al. 2023, section 4)",
    )
    modules_to_save: tuple[str, ...] = fields.names(
        (),
        "Modules to train whole beside the adapter, as in PEFT: a comma-separated list of embeddings, norms or the "
        "head, such as lm_head,embed_tokens,norm; a name is a module's path or the end of it.",
        metavar="NAMES",
    )
    dropout: float = fields.number(
        0.0,
        "Probability with which an entry of A's input is zeroed in training, the others being divided by "
        "1 - dropout; held-out losses and answers are computed without.",
        low=0.0,
        below=1.0,
        evidence="Dettmers et al. 2023, appendix B.2, use 0.1 up to 13B parameters and 0.05 above",
    )
    start_from: Path | None = fields.path(
        "Adapter to go on from instead of a new one: a run's folder, or one in PEFT's format. Ranks, scales, targets "
        "and modules that are trained whole are its own, and have to be where they are given. Its optimizer is not "
        "continued.",
        metavar="DIR",
        digest=False,
    )
    adapter_tag: str | None = fields.text(None, "Name for the adapter, kept in the manifest and the model card.")

    @property
    def scale(self) -> float:
        """The factor s of layers that no pattern matches, dimensionless."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def largest_rank(self) -> int:
        """The largest rank that a layer may have."""
        return max((self.rank, *(rank for _, rank in self.rank_pattern)))

    @property
    def has_patterns(self) -> bool:
        """Whether layers may have ranks or scales of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    def rank_of(self, path: str) -> int:
        """The rank of the layer at a module path."""
        return number_of(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The factor s of the layer at a module path, dimensionless."""
        rank = self.rank_of(path)
        return number_of(self.alpha_pattern, path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)
