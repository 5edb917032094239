"""A LoRA adapter in memory, whichever format it came from."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.patterns import matches, number_of

__all__ = ["LoraAdapter", "LoraPair", "Targets", "alpha_of", "combined"]


@attrs.frozen(kw_only=True, eq=False)
class LoraPair:
    """The update of one weight, s · B A (Hu et al. 2021, section 4.1).

    Attributes:
        a: (R, in) float32.
        b: (out, R) float32.
        scale: s, dimensionless.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it updates."""
        return self.b.shape[0], self.a.shape[1]


@attrs.frozen(kw_only=True)
class Targets:
    """Which modules an adapter's configuration says it adapts, as PEFT reads it.

    Attributes:
        names: ``all-linear``, a regular expression for whole paths, or names that paths equal or end with.
        excluded: the same, of those left out.
        layers: numbers of the layers it is confined to; None for all.
    """

    names: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def of(self, modules: Iterable[str]) -> set[str]:
        """Those of a base's linear layers that should be adapted."""
        return {
            module
            for module in modules
            if (self.names == "all-linear" or _matches(module, self.names))
            and not _matches(module, self.excluded)
            and (self.layers is None or _layer(module) in self.layers)
        }


@attrs.frozen(kw_only=True, eq=False)
class LoraAdapter:
    """What an adapter's files say, checked: every pair is complete and finite, its shapes, rank and scale agree.

    Attributes:
        source: the file or folder that it was read from, for messages.
        kind: ``peft``, ``v2`` or ``v3``: the format of the description.
        method: of the run that made it, ``lora`` or ``qlora``; None where the files do not say.
        pairs: name of the base's tensor → its update.
        whole: name of a tensor → what takes its place, trained whole beside the pairs.
        targets: what the configuration asks for; None where it lists its tensors one by one.
        base_model: folder or hub id of the base; None where the files do not say.
        base_sha256: name of a weight file of the base → its hash; empty where the files do not say.
        license_class: licence of the base, as the run was told; else None.
        held_out: rows that the run measured itself on, if they are there; else None.
        nf4: how the base was quantised; None where it was not, or the files do not say.
        config: the description as it was read.
    """

    source: Path
    kind: str
    method: str | None
    pairs: Mapping[str, LoraPair] = attrs.field(repr=False)
    whole: Mapping[str, NDArray[Any]] = attrs.field(factory=dict, repr=False)
    targets: Targets | None = None
    base_model: str | None = None
    base_sha256: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    license_class: str | None = None
    held_out: Path | None = None
    nf4: NF4Spec | None = None
    config: Mapping[str, Any] = attrs.field(factory=dict, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the adapted layers."""
        return tuple(name.removesuffix(".weight") for name in self.pairs)

    def settings(self) -> dict[str, Any]:
        """The fields of a contract whose sessions hold these pairs: ranks, alphas and their patterns.

        They are PEFT's own words where those still say what the pairs are. Else the usual rank and scale stand for
        all, and layers that have others are named one by one.
        """
        ours = _in_pefts_words(self)
        if ours is not None:
            return ours
        pairs = dict(zip(self.modules, self.pairs.values(), strict=True))
        rank, scale = self.usual()
        alpha = alpha_of(scale, rank)
        alphas = {module: alpha_of(pair.scale, pair.rank) for module, pair in pairs.items()}
        return {
            "rank": rank,
            "alpha": alpha,
            "rslora": False,
            "rank_pattern": {module: pair.rank for module, pair in pairs.items() if pair.rank != rank},
            "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        }

    def usual(self) -> tuple[int, float]:
        """The rank and the scale that most pairs have."""
        return Counter((pair.rank, pair.scale) for pair in self.pairs.values()).most_common(1)[0][0]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The pairs under the names that a session's state has."""
        tensors: dict[str, NDArray[np.float32]] = {}
        for module, pair in zip(self.modules, self.pairs.values(), strict=True):
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pair.a, pair.b
        return tensors

    def trained(self) -> dict[str, NDArray[np.float32]]:
        """The same, and beside them what is whole, as the state of a session has it that trains both."""
        return self.tensors() | {name: np.asarray(tensor, np.float32) for name, tensor in self.whole.items()}

    def check(self) -> None:
        """See that the numbers are fit for use.

        Raises:
            ModelError: if there is no pair, one has shapes that do not fit, or a number is not finite.
        """
        for name, tensor in self.whole.items():
            if not np.isfinite(np.asarray(tensor, np.float32)).all():
                raise ModelError("the adapter holds numbers that are not finite", where=f"{self.source}, {name}")
        if not self.pairs:
            raise ModelError("the adapter holds no low-rank update", where=self.source)
        for name, pair in self.pairs.items():
            if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1]:
                raise ModelError(
                    f"the two parts of an update do not fit: A {pair.a.shape}, B {pair.b.shape}",
                    where=f"{self.source}, {name}",
                    expected="A (rank, in), B (out, rank)",
                )
            if not (math.isfinite(pair.scale) and np.isfinite(pair.a).all() and np.isfinite(pair.b).all()):
                raise ModelError("the adapter holds numbers that are not finite", where=f"{self.source}, {name}")


def combined(parts: Sequence[tuple[LoraAdapter, float]]) -> LoraAdapter:
    """A linear combination of adapters as one adapter, exactly: their ranks lie side by side.

    Σ wᵢ sᵢ Bᵢ Aᵢ is the product of all B, each times wᵢ sᵢ, beside each other and all A below each other.

    Args:
        parts: adapters with their weights, dimensionless; at least one.

    Raises:
        ModelError: if one holds tensors trained whole, which have no sum, or two differ in a weight's shape.
    """
    first = parts[0][0]
    if len(parts) == 1 and parts[0][1] == 1:
        return first
    pairs: dict[str, list[tuple[LoraPair, float]]] = {}
    for adapter, weight in parts:
        if adapter.whole:
            raise ModelError(
                "an adapter with tensors trained whole cannot be combined", where=adapter.source, expected="pairs alone"
            )
        for name, pair in adapter.pairs.items():
            pairs.setdefault(name, []).append((pair, weight * pair.scale))
    for name, found in pairs.items():
        if len({pair.shape for pair, _ in found}) > 1:
            raise ModelError(
                f"the adapters do not fit each other: {name} is updated in the shapes "
                f"{', '.join(str(pair.shape) for pair, _ in found)}",
                where=", ".join(str(adapter.source) for adapter, _ in parts),
                expected="adapters of one base",
            )
    return attrs.evolve(
        first,
        pairs={
            name: LoraPair(
                a=np.concatenate([pair.a for pair, _ in found]),
                b=np.concatenate([pair.b * np.float32(factor) for pair, factor in found], axis=1),
                scale=1.0,
            )
            for name, found in pairs.items()
        },
        targets=None,
    )


def alpha_of(scale: float, rank: int) -> float | int:
    """The alpha with alpha / rank = scale; whole ones as integers, which older readers expect."""
    nearest = scale * rank
    around = (float(round(nearest)), nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf))
    alpha = next((candidate for candidate in around if candidate / rank == scale), nearest)
    return int(alpha) if alpha.is_integer() else alpha


def _in_pefts_words(adapter: LoraAdapter) -> dict[str, Any] | None:
    """The settings as the adapter's configuration has them; None where it has none, or its pairs are others now."""
    config, modules = adapter.config, adapter.modules
    if adapter.kind != "peft":
        return None
    ranks, alphas = (
        {key: number for key, number in (config.get(name) or {}).items() if any(matches(key, path) for path in modules)}
        for name in ("rank_pattern", "alpha_pattern")
    )
    rank, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    for module, pair in zip(modules, adapter.pairs.values(), strict=True):
        own = number_of(ranks.items(), module, rank)
        divisor = own**0.5 if rslora else own
        if (pair.rank, pair.scale) != (own, number_of(alphas.items(), module, alpha) / divisor):
            return None
    return {"rank": rank, "alpha": alpha, "rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}


def _matches(module: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _layer(module: str) -> int | None:
    """The number of the block that a module belongs to: the first one in its path."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)
