"""Certify the installed backends on a model, or on tiny models of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mens_core.contract import METHODS
from mens_core.errors import ContractError
from mens_core.hf.hub import find_model
from mens_core.hf.layout import GRAPHS
from mens_core.parity.certificate import certificate
from mens_core.parity.kernels import Subject, compare_kernels
from mens_core.parity.subjects import able_backends, tiny_model
from mens_core.planner import plan_in_float32

__all__ = ["certify"]


def certify(
    *,
    model: str | None = None,
    families: Sequence[str] = (),
    backends: Sequence[str] | None = None,
    news: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compare backends with each other and with the specification, in float32.

    Args:
        model: folder or hub id of a base; or
        families: out of ``mens_core.hf.layout.GRAPHS``, each taken as a tiny seeded random model.
        backends: names; None for every one whose packages are here.
        news: called with each model's part as it is done.

    Returns:
        The certificate, see ``docs/numerics.md``; ``passed`` is its verdict.

    Raises:
        ContractError: neither a model nor a family is given, or an unknown family.
        MensError: the model or a backend cannot be used.
    """
    unknown = sorted(set(families) - set(GRAPHS))
    if unknown or bool(families) == (model is not None):
        raise ContractError(
            f"there is no family {unknown[0]!r}" if unknown else "give a model or families, one of the two",
            expected=f"families out of {', '.join(GRAPHS)}",
        )
    parts = []
    for label, folder in _folders(model, families):
        names, notes = (tuple(backends), ()) if backends else able_backends(folder, plan_in_float32)
        subject = Subject(label=label, folder=folder, backends=names, methods=METHODS, notes=notes)
        parts.append(compare_kernels(subject, plan_in_float32))
        if news is not None:
            news(parts[-1])
    return certificate(parts)


def _folders(model: str | None, families: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Label and folder of each model; a family's is gone when the next is asked for."""
    if model is not None:
        yield find_model(model, None)
    for family in families:
        with tiny_model(family) as found:
            yield found
