"""Leave rows out by what they say of themselves, and count them."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from mens_core.corpus.row import Row
from mens_core.errors import DataError

__all__ = ["Selection", "select_rows"]

_SEARCHED = ("category", "lane", "task_family")


@attrs.frozen
class Selection:
    """The rows that stay, and how many were left out for which reason."""

    rows: list[Row]
    rows_dropped_rating: int
    rows_dropped_filter: int


def select_rows(rows: Iterable[Row], *, min_rating: int | None, context_filter: str | None) -> Selection:
    """Keep the rows that are rated well enough and belong to what is trained on.

    Args:
        rows: from ``read_rows``.
        min_rating: rows with a lower ``rating`` are left out, rows without one stay; None for no such rule.
        context_filter: rows none of whose ``category``, ``lane`` and ``task_family`` contains it are left out;
            upper and lower case are alike; None for no such rule.

    Raises:
        DataError: if a rating that has to be compared is no number from 1 to 5, or no row is left.
    """
    kept, counts = [], {"rating": 0, "filter": 0, "all": 0}
    for row in rows:
        counts["all"] += 1
        if min_rating is not None and _rating(row, min_rating) < min_rating:
            counts["rating"] += 1
        elif context_filter is not None and not _mentions(row, context_filter.lower()):
            counts["filter"] += 1
        else:
            kept.append(row)
    if not kept:
        raise DataError(
            "no row is left to train on",
            where=f"{counts['all']} rows: {counts['rating']} rated too low, {counts['filter']} of another context",
            fix="lower --min-rating, or widen --context-filter",
        )
    return Selection(kept, counts["rating"], counts["filter"])


def _rating(row: Row, unrated: int) -> float:
    rating = row.metadata.get("rating")
    if rating is None:
        return unrated
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not 1 <= rating <= 5:
        raise DataError("a row has no usable rating", where=f"line {row.line}: {rating!r}", expected="1 to 5, or none")
    return rating


def _mentions(row: Row, needle: str) -> bool:
    return any(needle in str(row.metadata.get(key, "")).lower() for key in _SEARCHED)
