"""What becomes of rows that are longer than a model or its user allows, and the ledger of what that costs.

    drop       the row is left out
    truncate   its end is cut off; with ``truncation_side`` left its start
    split      it becomes several rows of at most the length, each of which starts afresh
    error      it refuses the run
    auto       drop, but not more than 5 % of the rows

Cutting moves the ends of a row, so the mask stays on its tokens from either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.errors import DataError
from mens_core.text.tokens import TokenRows

__all__ = ["LengthLedger", "Loss", "fit_rows"]

_MOST_DROPPED_BY_DEFAULT = 0.05
_SOURCES_SHOWN = 20
_OTHERS = "(others)"


@attrs.frozen(kw_only=True)
class Loss:
    """What the length costs the rows of one source.

    Attributes:
        rows: rows before.
        supervised_tokens: their supervised tokens.
        rows_overlong: rows longer than allowed.
        rows_dropped_overlong: of these, rows left out.
        rows_truncated: of these, rows cut.
        rows_split: of these, rows split.
        rows_dropped_unsupervised: rows, or parts of rows, left out because nothing in them is supervised.
        supervised_tokens_cut: supervised tokens lost by cutting and splitting.
        supervised_tokens_dropped: supervised tokens of rows left out.
    """

    rows: int = 0
    supervised_tokens: int = 0
    rows_overlong: int = 0
    rows_dropped_overlong: int = 0
    rows_truncated: int = 0
    rows_split: int = 0
    rows_dropped_unsupervised: int = 0
    supervised_tokens_cut: int = 0
    supervised_tokens_dropped: int = 0


@attrs.frozen(kw_only=True)
class LengthLedger:
    """The cost of the length over all rows, and by source.

    Attributes:
        total: over all rows.
        by_source: of the sources that lose something, the largest losers first; beyond twenty they are added up.
        longest: the longest row before, in tokens.
        seq_len: the longest row allowed, in tokens.
    """

    total: Loss
    by_source: Mapping[str, Loss]
    longest: int
    seq_len: int

    def as_dict(self) -> dict[str, Any]:
        """The ledger as plan, report and manifest keep it, without its zeros."""
        return {
            "seq_len": self.seq_len,
            "longest_row": self.longest,
            "total": attrs.asdict(self.total),
            "by_source": {
                name: {key: value for key, value in attrs.asdict(loss).items() if value}
                for name, loss in self.by_source.items()
            },
        }


def fit_rows(
    rows: TokenRows,
    groups: NDArray[np.int32],
    sources: Sequence[str],
    *,
    seq_len: int,
    policy: str,
    side: str = "right",
) -> tuple[TokenRows, LengthLedger]:
    """Make rows fit.

    Args:
        rows: of any length.
        groups: (rows,) the place of each row's source in ``sources``.
        sources: names of sources.
        seq_len: longest row, in tokens.
        policy: see the module.
        side: where ``truncate`` cuts, ``right`` or ``left``.

    Returns:
        (the rows, in their order, that have a supervised token; what was lost).

    Raises:
        DataError: if there are too long rows under ``error``, too many under ``auto``, or none remains.
    """
    overlong, longest = _overlong(rows, seq_len)
    _check(overlong, len(rows), longest, seq_len, policy)
    sums = {field.name: np.zeros(len(sources)) for field in attrs.fields(Loss)}
    parts, same = [], True
    for place, part in rows.parts():
        fitted, losses = _fit(part, seq_len, policy, side)
        for name, values in losses:
            # Sums of whole numbers in float64 are exact below 2⁵³.
            sums[name] += np.bincount(groups[place], weights=values, minlength=len(sources))
        parts.append(fitted)
        same = same and fitted is part
    ledger = _ledger(sums, sources, longest, seq_len)
    if not any(map(len, parts)):
        raise DataError(
            "no row is left to train on",
            where=f"{len(rows)} rows: {overlong} longer than {seq_len} tokens, "
            f"{ledger.total.rows_dropped_unsupervised} unsupervised",
            fix="raise --seq-len or shorten the rows",
        )
    return rows if same else _joined(rows, parts), ledger


def _overlong(rows: TokenRows, seq_len: int) -> tuple[int, int]:
    """(how many rows are longer than that, the longest)."""
    overlong = longest = 0
    for _, part in rows.parts():
        lengths = part.lengths
        overlong += int(np.count_nonzero(lengths > seq_len))
        longest = max(longest, int(lengths.max()))
    return overlong, longest


def _fit(rows: TokenRows, seq_len: int, policy: str, side: str) -> tuple[TokenRows, Iterator[tuple[str, NDArray[Any]]]]:
    """(the rows that fit and have a supervised token, the same object if all do; losses of each row by name)."""
    overlong = rows.lengths > seq_len
    fitted, owners = rows, np.arange(len(rows))
    if overlong.any():
        spans, owners = _spans(rows, overlong, seq_len, policy, side)
        fitted = rows.take(owners)
        changed = np.flatnonzero(overlong[owners])
        if changed.size:
            trained = fitted.trained.copy()
            trained[changed] = fitted.cut(spans[0][changed], spans[1][changed]).trained
            fitted = attrs.evolve(fitted, starts=spans[0], ends=spans[1], trained=trained)
    kept = fitted.trained > 0
    losses = _per_row(rows, overlong, fitted, owners, kept, policy)
    return fitted if kept.all() else fitted.take(kept), losses


def _joined(rows: TokenRows, parts: Sequence[TokenRows]) -> TokenRows:
    numbers = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("starts", "ends", "trained")}
    return attrs.evolve(rows, **numbers)


def _check(overlong: int, count: int, longest: int, seq_len: int, policy: str) -> None:
    allowed = {"error": 0.0, "auto": _MOST_DROPPED_BY_DEFAULT}.get(policy, 1.0)
    if overlong > allowed * count:
        raise DataError(
            f"{overlong} of {count} rows are longer than {seq_len} tokens (the longest: {longest})",
            expected=f"at most {allowed:.0%} of the rows to be dropped for their length",
            fix=f"--seq-len {longest}, or accept the loss with --on-overlong drop, truncate or split",
        )


def _spans(
    rows: TokenRows, overlong: NDArray[np.bool_], seq_len: int, policy: str, side: str
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """((starts, ends), owners): the spans after the policy, and the row that each of them comes from."""
    every = np.arange(len(rows))
    if policy == "truncate":
        starts = np.maximum(rows.starts, rows.ends - seq_len) if side == "left" else rows.starts
        ends = rows.ends if side == "left" else np.minimum(rows.ends, rows.starts + seq_len)
        return (starts, ends), every
    if policy == "split":
        parts = -(-rows.lengths // seq_len)
        owners = np.repeat(every, parts)
        number = np.arange(len(owners)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = rows.starts[owners] + number * seq_len
        return (starts, np.minimum(starts + seq_len, rows.ends[owners])), owners
    owners = every[~overlong]
    return (rows.starts[owners], rows.ends[owners]), owners


def _ledger(sums: Mapping[str, NDArray[Any]], sources: Sequence[str], longest: int, seq_len: int) -> LengthLedger:
    losing = np.flatnonzero(sums["rows_overlong"] + sums["rows_dropped_unsupervised"])
    losers = sorted(losing.tolist(), key=lambda place: (-sums["rows_overlong"][place], sources[place]))
    by_source = {sources[place]: _loss(sums, place) for place in losers[:_SOURCES_SHOWN]}
    if len(losers) > _SOURCES_SHOWN:
        by_source[_OTHERS] = _loss(sums, losers[_SOURCES_SHOWN:])
    return LengthLedger(total=_loss(sums, slice(None)), by_source=by_source, longest=longest, seq_len=seq_len)


def _per_row(
    rows: TokenRows,
    overlong: NDArray[np.bool_],
    fitted: TokenRows,
    owners: NDArray[np.int64],
    kept: NDArray[np.bool_],
    policy: str,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The fields of ``Loss``, (rows,) each."""
    present = np.bincount(owners, minlength=len(rows)) > 0
    yield "rows", np.ones(len(rows), np.bool_)
    yield "supervised_tokens", rows.trained
    yield "rows_overlong", overlong
    yield "rows_dropped_overlong", overlong & ~present
    yield "rows_truncated", overlong & (policy == "truncate")
    yield "rows_split", overlong & (policy == "split")
    yield "rows_dropped_unsupervised", np.bincount(owners, weights=~kept, minlength=len(rows))
    remaining = np.bincount(owners, weights=np.where(kept, fitted.trained, 0), minlength=len(rows)).astype(np.int64)
    yield "supervised_tokens_cut", np.where(present, rows.trained - remaining, 0)
    yield "supervised_tokens_dropped", np.where(present, 0, rows.trained)


def _loss(sums: Mapping[str, NDArray[Any]], places: int | list[int] | slice) -> Loss:
    return Loss(**{name: int(values[places].sum()) for name, values in sums.items()})
