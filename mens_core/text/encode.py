"""Rendered conversations → token ids with a mask.

The text is cut where an assistant's part begins and ends, and each piece is tokenised by itself, as it will be when the
model has to go on from a prompt: no token of an answer ever reaches into the prompt, and the mask is the pieces' own.
A tokenizer that puts something before every text cannot be cut; its whole texts are tokenised, and the mask is
read off the places of the tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from mens_core.chat.open_chat import Chat, ChatML, Rendered, open_chat
from mens_core.corpus.faults import Fault
from mens_core.errors import ModelError
from mens_core.hf.files import regular_size
from mens_core.hf.layout import Layout
from mens_core.text.guard import Guard
from mens_core.text.lab import lab_tokenizer
from mens_core.text.repeated import Repeated
from mens_core.text.tokens import TokenRow, TokenRows

__all__ = ["Encoder", "open_encoder", "open_tokenizer"]

# Ends of text that models use beside the end of a turn.
_USUAL_STOPS = ("<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>")


def open_encoder(tokenizer: str, tokenizer_file: Path | None, folder: Path, layout: Layout) -> Encoder:
    """The encoder of a base.

    Args:
        tokenizer: ``hf``, with the chat template that the folder holds, or ``lab``.
        tokenizer_file: the tokenizer.json of ``hf``.
        folder: of the model.
        layout: of the model.

    Raises:
        ModelError: if tokenizer or chat template are malformed.
    """
    opened, content = open_tokenizer(tokenizer_file if tokenizer == "hf" else None, layout)
    return Encoder(opened, open_chat(folder, opened) if tokenizer == "hf" else ChatML(opened), content)


def open_tokenizer(path: Path | None, layout: Layout) -> tuple[Tokenizer, str | None]:
    """The tokenizer of a file such as ``tokenizer.json``, checked against the embedding; without a file the lab's.

    Returns:
        (the tokenizer, sha256 of the bytes that it was made from; None for the lab's).

    Raises:
        ModelError: if the file is malformed, or gives ids the embedding has no row for.
    """
    if path is None:
        return lab_tokenizer(), None
    regular_size(path)
    try:
        content = path.read_bytes()
        opened = Tokenizer.from_buffer(content)
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
    return opened, hashlib.sha256(content).hexdigest()


class Encoder:
    """Turns rendered conversations into ids and masks, in batches.

    Args:
        tokenizer: from tokenizer.json; truncation and padding it may carry are switched off.
        chat: the model's own way to write conversations.
        content: sha256 of the bytes that the tokenizer was made from; None to hash what it writes, ten times as slow.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat, content: str | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.chat, self._content = tokenizer, chat, content
        self.prefix = _sequence_start(tokenizer) if chat.adds_bos else ()
        self._cuts = _can_be_cut(tokenizer)

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 over all that decides the ids of a conversation."""
        parts = (self._content or self.tokenizer.to_str(), self.chat.digest, str(self.prefix), str(self._cuts))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, rendered: Sequence[Rendered]) -> list[TokenRow | Fault]:
        """Encode conversations; in the place of one whose mask would cut a token stands what is wrong with it."""
        plain = [(one.text, one.supervised) for one in rendered if not one.quoted]
        encoded = iter(self._encoded(self.tokenizer, plain))
        return [self._quoting(one) if one.quoted else next(encoded) for one in rendered]

    def lay_out(self, rendered: Sequence[Rendered]) -> tuple[TokenRows, dict[int, Fault]]:
        """Encode conversations end to end.

        Returns:
            (the rows that can be encoded; place of every other → what is wrong with it).
        """
        if self._cuts and not any(one.quoted for one in rendered):
            return self._in_pieces(self.tokenizer, [(one.text, one.supervised) for one in rendered]), {}
        encoded = self.encode(rendered)
        faults = {place: row for place, row in enumerate(encoded) if isinstance(row, Fault)}
        return TokenRows.of(row for row in encoded if isinstance(row, TokenRow)), faults

    def prompt(self, rendered: Rendered) -> list[int]:
        """The ids of one prompt.

        Raises:
            Fault: if it cannot be encoded.
        """
        row = self.encode([rendered])[0]
        if isinstance(row, Fault):
            raise row
        ids: list[int] = row.input_ids.tolist()
        return ids

    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a turn: its end tags where they are one token, and the usual end-of-text tokens."""
        ids = (self.tokenizer.token_to_id(name) for name in dict.fromkeys((*self.chat.end_tags, *_USUAL_STOPS)))
        return tuple(token for token in ids if token is not None)

    def _encoded(self, tokenizer: Tokenizer, texts: Sequence[_Marked]) -> Iterable[TokenRow | Fault]:
        return self._in_pieces(tokenizer, texts) if self._cuts else self._whole(tokenizer, texts)

    def _in_pieces(self, tokenizer: Tokenizer, texts: Sequence[_Marked]) -> TokenRows:
        known = self._known if tokenizer is self.tokenizer else Repeated(tokenizer, ())
        rows = [known.pieces(text, supervised) for text, supervised in texts]
        unknown = [text for row in rows for text, ids, _ in row if ids is None]
        encoded = iter(tokenizer.encode_batch_fast(unknown, add_special_tokens=False))
        flat: list[int] = []
        lengths: list[int] = []
        marks: list[bool] = []
        ends: list[int] = [0]
        for row in rows:
            flat += self.prefix
            lengths.append(len(self.prefix))
            marks.append(False)
            for text, ids, trained in row:
                if ids is None:
                    ids = next(encoded).ids  # noqa: PLW2901 (what was not known is now)
                    if not trained:
                        known.learn(text, ids)
                flat += ids
                lengths.append(len(ids))
                marks.append(trained)
            ends.append(len(flat))
        return TokenRows.laid_out(np.fromiter(flat, np.int32, len(flat)), np.repeat(marks, lengths), np.diff(ends))

    def _whole(self, tokenizer: Tokenizer, texts: Sequence[_Marked]) -> Iterable[TokenRow | Fault]:
        encoded = tokenizer.encode_batch([text for text, _ in texts], add_special_tokens=False)
        swallowing = _swallowing(tokenizer)
        for encoding, (_, supervised) in zip(encoded, texts, strict=True):
            yield self._masked(encoding, supervised, swallowing)

    def _masked(self, encoding: Encoding, supervised: _Spans, swallowing: frozenset[int]) -> TokenRow | Fault:
        ids = np.asarray([*self.prefix, *encoding.ids], np.int32)
        mask = np.zeros(len(ids), np.bool_)
        offsets = encoding.offsets
        starts = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
        for start, end in supervised:
            first, behind = (int(np.searchsorted(starts, place)) for place in (start, end))
            before = first - 1
            # A control token that takes the blanks behind it with it leaves none of the answer's own.
            if before >= 0 and offsets[before][1] > start and encoding.ids[before] not in swallowing:
                return Fault(
                    "an answer whose first characters are one token with the end of the prompt",
                    "an answer that does not start with blanks: this tokenizer cannot tell them from the prompt's",
                )
            mask[len(self.prefix) + first : len(self.prefix) + behind] = True
        return TokenRow(ids, mask)

    def _quoting(self, rendered: Rendered) -> TokenRow | Fault:
        """Encode a conversation that quotes control tokens."""
        guard = self._guard
        try:
            (row,) = self._encoded(guard.tokenizer, [guard.rename(rendered)])
            if isinstance(row, Fault):
                return row
            quoted = (rendered.text[start:end] for start, end in rendered.quoted)
            return TokenRow(guard.restore(row.input_ids, quoted), row.supervised)
        except Fault as fault:
            return fault

    @functools.cached_property
    def _guard(self) -> Guard:
        return Guard(self.tokenizer)

    @functools.cached_property
    def _known(self) -> Repeated:
        return Repeated(self.tokenizer, self.chat.end_tags)


_Spans = Sequence[tuple[int, int]]
_Marked = tuple[str, _Spans]


def _can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text's pieces give the text's tokens: nothing is put before a piece, nothing swallows its blanks."""

    def ids(text: str) -> Any:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return ids("a\nb") == ids("a\n") + ids("b") and not _swallowing(tokenizer)


def _swallowing(tokenizer: Tokenizer) -> frozenset[int]:
    """The added tokens that take the blanks beside them with them."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, entry in added.items() if entry.lstrip or entry.rstrip)


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
