"""What ``corpus pairs`` does unless it is told otherwise; its help names these without waiting for the rest."""

from __future__ import annotations

__all__ = ["EVAL_FRACTION", "MAX_CHARS", "MIN_CHARS", "MULTI_TURN", "NEGATIVES", "SIMILARITY"]

#: Share of the groups held out.
EVAL_FRACTION = 0.05
#: Characters of a response below which there is nothing to learn from it.
MIN_CHARS = 20
#: Characters of prompt and response together. With its tags such a row fits the 1024 positions of the lab base,
#: which reads bytes; in a vocabulary made for code it has some 300 tokens.
MAX_CHARS = 900
#: Shares of the functions that are also shown broken, and talked about: enough to learn the form from, while most
#: rows stay plain code, and few responses come twice.
NEGATIVES, MULTI_TURN = 0.1, 0.1
#: Similarity of near duplicates, the one of The Stack (Kocetkov et al., 2022, arXiv 2211.15533).
SIMILARITY = 0.85
