"""Rows → token ids with a mask, and the count of everything that was cut or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from mens_core.corpus.row import Row
from mens_core.errors import DataError, ModelError
from mens_core.hf.files import regular_size
from mens_core.hf.layout import Layout
from mens_core.text.chat import TURN_END, Segment, segments
from mens_core.text.lab import lab_tokenizer

__all__ = ["EncodedRows", "Encoder", "TokenRow", "encode_rows", "open_tokenizer"]

_MOST_DROPPED_BY_DEFAULT = 0.05
_ROWS_AT_A_TIME = 1024


@attrs.frozen(eq=False)
class TokenRow:
    """One row as tokens.

    Attributes:
        input_ids: (tokens,) int32.
        supervised: (tokens,) bool, true where the token itself is to be predicted.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


@attrs.frozen(kw_only=True)
class EncodedRows:
    """The rows that will be trained on, and the ledger of what was not.

    Attributes:
        rows: in the file's order.
        overlong_dropped: rows left out because they exceed the length.
        truncated: rows cut to the length.
        supervised_cut: supervised tokens lost by cutting.
        unsupervised_dropped: rows left out because no supervised token remained.
        left_out: further counters, of rows left out before they were encoded.
    """

    rows: tuple[TokenRow, ...]
    overlong_dropped: int
    truncated: int
    supervised_cut: int
    unsupervised_dropped: int
    left_out: Mapping[str, int] = attrs.field(factory=dict)

    def counters(self) -> dict[str, int]:
        """The ledger as the manifest keeps it."""
        return {
            "rows": len(self.rows),
            "tokens": sum(len(row.input_ids) for row in self.rows),
            "supervised_tokens": sum(int(row.supervised.sum()) for row in self.rows),
            "rows_dropped_overlong": self.overlong_dropped,
            "rows_dropped_unsupervised": self.unsupervised_dropped,
            "rows_truncated": self.truncated,
            "supervised_tokens_cut": self.supervised_cut,
            **self.left_out,
        }


def open_tokenizer(path: Path | None, layout: Layout) -> Tokenizer:
    """The tokenizer of a file such as ``tokenizer.json``, checked against the embedding; without a file the lab's.

    Raises:
        ModelError: if the file is malformed, or gives ids the embedding has no row for.
    """
    if path is None:
        return lab_tokenizer()
    regular_size(path)
    try:
        opened = Tokenizer.from_file(str(path))
    # The library raises a bare Exception for every malformed file.
    except Exception as error:
        raise ModelError(f"tokenizer.json cannot be read: {error}", where=path) from error
    highest = max(opened.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= layout.vocab_size:
        raise ModelError(
            "the tokenizer gives ids for which the model has no embedding",
            where=f"{path}: highest id {highest}, embedding rows {layout.vocab_size}",
            fix="use the tokenizer that belongs to the model",
        )
    return opened


class Encoder:
    """Turns segments into ids with one tokenizer, in batches.

    Args:
        tokenizer: from tokenizer.json; truncation and padding it may carry are switched off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Content is never read as a control token, whatever it says.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.prefix = _sequence_start(tokenizer)

    def encode(self, rendered: Sequence[Sequence[Segment]]) -> list[TokenRow]:
        """Encode conversations; each starts with the tokens the tokenizer puts before every sequence."""
        texts = [segment.text for row in rendered for segment in row if self._tag(segment) is None]
        contents = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [self._row(row, contents) for row in rendered]

    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a turn: the end tag where it is one token, and the usual end-of-text tokens."""
        names = (TURN_END, "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>")
        ids = (self.tokenizer.token_to_id(name) for name in names)
        return tuple(token for token in ids if token is not None)

    def _tag(self, segment: Segment) -> int | None:
        return self.tokenizer.token_to_id(segment.text) if segment.tag else None

    def _row(self, row: Sequence[Segment], contents: Iterator[Encoding]) -> TokenRow:
        ids, mask = list(self.prefix), [False] * len(self.prefix)
        for segment in row:
            tag = self._tag(segment)
            piece = next(contents).ids if tag is None else [tag]
            ids.extend(piece)
            mask.extend([segment.supervised] * len(piece))
        return TokenRow(np.asarray(ids, np.int32), np.asarray(mask, np.bool_))


def encode_rows(rows: Iterable[Row], encoder: Encoder, *, seq_len: int, on_overlong: str) -> EncodedRows:
    """Encode a file's rows and apply the length policy.

    Args:
        rows: from ``corpus.rows``.
        encoder: for the model's tokenizer.
        seq_len: longest row, in tokens.
        on_overlong: ``auto`` drops, but not more than 5 % of the rows; ``drop``; ``truncate`` keeps the head;
            ``error``.

    Raises:
        DataError: if a row is too long under ``error``, too many are under ``auto``, or none remains.
    """
    kept: list[TokenRow] = []
    counts = Counter[str]()
    longest = 0
    for row in _encoded(rows, encoder):
        counts["all"] += 1
        longest = max(longest, len(row.input_ids))
        supervised = row.supervised
        if len(row.input_ids) > seq_len:
            counts["overlong"] += 1
            if on_overlong != "truncate":
                continue
            counts["cut"] += int(supervised[seq_len:].sum())
            supervised = supervised[:seq_len]
        if supervised[1:].any():
            kept.append(TokenRow(row.input_ids[:seq_len], supervised))
        else:
            counts["unsupervised"] += 1
    _check_overlong(counts, longest, seq_len, on_overlong)
    if not kept:
        raise DataError(
            "no row is left to train on",
            where=f"{counts['all']} rows: {counts['overlong']} longer than {seq_len} tokens, "
            f"{counts['unsupervised']} unsupervised",
            fix="raise --seq-len or shorten the rows",
        )
    truncates = on_overlong == "truncate"
    return EncodedRows(
        rows=tuple(kept),
        overlong_dropped=0 if truncates else counts["overlong"],
        truncated=counts["overlong"] if truncates else 0,
        supervised_cut=counts["cut"],
        unsupervised_dropped=counts["unsupervised"],
    )


def _encoded(rows: Iterable[Row], encoder: Encoder) -> Iterator[TokenRow]:
    """Encode in pieces: the tokenizer's own records of a row are fifty times as large as its ids."""
    remaining = iter(rows)
    while piece := list(islice(remaining, _ROWS_AT_A_TIME)):
        yield from encoder.encode([segments(row.turns) for row in piece])


def _check_overlong(counts: Counter[str], longest: int, seq_len: int, on_overlong: str) -> None:
    allowed = {"error": 0.0, "auto": _MOST_DROPPED_BY_DEFAULT}.get(on_overlong, 1.0)
    if counts["overlong"] > allowed * counts["all"]:
        raise DataError(
            f"{counts['overlong']} of {counts['all']} rows are longer than {seq_len} tokens (the longest: {longest})",
            expected=f"at most {allowed:.0%} of the rows to be dropped for their length",
            fix=f"--seq-len {longest}, or accept the loss with --on-overlong drop or --on-overlong truncate",
        )


def _sequence_start(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids a tokenizer's post-processor puts before a sequence, such as Llama's begin-of-text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    start = next((k for k in range(len(framed)) if framed[k : k + len(plain)] == plain), None)
    if start is None:
        raise ModelError(
            "the tokenizer rewrites a sequence when it adds its special tokens, so what stands before it is not known",
            where=f'"a" gives {plain} without them and {framed} with them',
        )
    return tuple(framed[:start])
