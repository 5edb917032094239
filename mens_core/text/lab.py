"""The lab tokenizer: one id per byte, so that any file can be read, trained on and written back unchanged.

    ids 0 … 255      the byte of that value
    id  256          <|endoftext|>    ends a document; also the padding
    id  257          <|im_start|>     opens a ChatML turn
    id  258          <|im_end|>       closes a ChatML turn

It needs no download, has no unknown token, and its loss per token is a loss per byte, which compares across
corpora. The vocabulary uses GPT-2's printable stand-ins for bytes (Radford et al. 2019, ``encoder.py``), so
the ``tokenizers`` library and transformers open the written folder with their ordinary byte-level classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from mens_core.atomic import replacing
from mens_core.chat.open_chat import TURN_END, TURN_START
from mens_core.errors import DataError

__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "NUM_BYTES",
    "SPECIAL_TOKENS",
    "TURN_END",
    "TURN_END_ID",
    "TURN_START",
    "TURN_START_ID",
    "VOCABULARY_TOKENS",
    "decode_bytes",
    "encode_bytes",
    "lab_tokenizer",
    "write_lab_tokenizer",
]

#: Ids below this number are bytes.
NUM_BYTES = 256
END_OF_TEXT = "<|endoftext|>"
#: In order of their ids, from NUM_BYTES upwards.
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID = range(NUM_BYTES, NUM_BYTES + len(SPECIAL_TOKENS))
#: Number of ids that mean something; a model may round its embedding up.
VOCABULARY_TOKENS = NUM_BYTES + len(SPECIAL_TOKENS)

#: ChatML with a newline between turns and none after the last, in the template language of transformers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def _byte_characters() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte value, in order of the byte values."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    # Control characters and blanks are moved behind the first 256 code points, in their own order.
    moved = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return tuple(chr(value if value in printable else next(moved)) for value in range(NUM_BYTES))


def lab_tokenizer() -> Tokenizer:
    """Build the lab tokenizer.

    Text is encoded as its UTF-8 bytes. The three special tokens are recognised in text unless the caller sets
    ``tokenizer.encode_special_tokens = True``, which is what content of unknown origin asks for.

    Returns:
        A ``tokenizers.Tokenizer`` with ``VOCABULARY_TOKENS`` ids; a fresh object at each call, since its
        settings can be changed.
    """
    # heavy: a compiled extension, needed by no command that only prints help
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = {character: value for value, character in enumerate(_byte_characters())}
    # A whole text is one word here; ten thousand of them, kept lest they come again, would take eighty megabytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], cache_capacity=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_lab_tokenizer(directory: Path, *, max_length_tokens: int = 1024) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``AutoTokenizer.from_pretrained`` opens.

    End of sequence and padding are both ``<|endoftext|>``; the ChatML template comes with it. Both files
    appear whole or not at all.

    Args:
        directory: the model folder; it is made when it does not exist.
        max_length_tokens: the longest row the model beside it can read, in tokens (1 or more).

    Raises:
        DataError: if ``max_length_tokens`` is below 1, or ``directory`` is a file.
    """
    if max_length_tokens < 1:
        raise DataError(
            "the lab tokenizer cannot be written",
            where=f"max_length_tokens = {max_length_tokens}",
            expected="1 or more",
            fix="give the n_positions of the model it belongs to",
        )
    if directory.exists() and not directory.is_dir():
        raise DataError(
            "the lab tokenizer cannot be written",
            where=directory,
            expected="a folder, or a path that is free",
            fix="choose another folder",
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length_tokens,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    with replacing(directory / "tokenizer.json", directory / "tokenizer_config.json") as (vocabulary, config):
        vocabulary.write(lab_tokenizer().to_str(pretty=True) + "\n")
        config.write(json.dumps(settings, indent=2) + "\n")


def encode_bytes(data: bytes) -> list[int]:
    """The ids of any bytes: their values, valid UTF-8 or not; no special token is recognised."""
    return list(data)


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes of ids 0 … 255: the exact inverse of ``encode_bytes``.

    Raises:
        DataError: if an id is not a byte; special tokens stand for no bytes and have to be cut off first.
    """
    listed = list(ids)
    for position, token in enumerate(listed):
        if not 0 <= token < NUM_BYTES:
            raise DataError(
                f"id {token} is not a byte",
                where=f"position {position} of {len(listed)}",
                expected=f"ids from 0 to {NUM_BYTES - 1}",
                fix="cut special tokens off before decoding",
            )
    return bytes(listed)
