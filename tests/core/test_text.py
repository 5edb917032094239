"""Masks and packing: what is trained on is exactly what the assistant said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.row import Turn
from mens_core.errors import DataError
from mens_core.exchange import IGNORE
from mens_core.text.chat import TURN_END, TURN_START, opening, segments
from mens_core.text.encode import Encoder, TokenRow, encode_rows
from mens_core.text.lab import lab_tokenizer
from mens_core.text.pack import batches, epoch_order, pack, run_shape, steps_per_epoch, windows

ENCODER = Encoder(lab_tokenizer())

# Any text a file can hold, role tags among it.
contents = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.sampled_from([TURN_END, TURN_START])
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(
    lambda pairs: tuple(turn for said, answered in pairs for turn in (Turn("user", said), Turn("assistant", answered)))
)


def text_of(rendered):
    return "".join(segment.text for segment in rendered)


def test_chatml_is_rendered_to_the_letter():
    turns = (Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "hello"))
    assert text_of(segments(turns)) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    )


@given(conversations)
def test_a_conversation_starts_with_the_opening_of_its_prompt_and_ends_with_the_answer(turns):
    whole, prompt = text_of(segments(turns)), text_of(opening(turns[:-1]))
    assert whole == prompt + turns[-1].content + TURN_END


@given(conversations)
def test_supervised_tokens_decode_to_the_assistants_words_and_end_tags_and_nothing_else(turns):
    row = ENCODER.encode([segments(turns)])[0]
    decoded = ENCODER.tokenizer.decode(row.input_ids[row.supervised].tolist(), skip_special_tokens=False)
    assert decoded == "".join(turn.content + TURN_END for turn in turns if turn.role == "assistant")


@given(conversations)
def test_a_tag_inside_a_content_never_becomes_a_control_token(turns):
    row = ENCODER.encode([segments(turns)])[0]
    tag = ENCODER.tokenizer.token_to_id(TURN_START)
    assert int((row.input_ids == tag).sum()) == len(turns)


@given(conversations)
def test_a_prompt_is_encoded_as_the_start_of_its_row(turns):
    row, prompt = ENCODER.encode([segments(turns), opening(turns[:-1])])
    assert row.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()


def _row(length, supervised):
    return TokenRow(np.arange(length, dtype=np.int32), np.arange(length) >= length - supervised)


def test_targets_are_shifted_by_one_inside_each_row():
    batch = pack([_row(4, 2), _row(3, 3)])
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [IGNORE, 2, 3, IGNORE, 1, 2, IGNORE]
    assert batch.row_lengths.tolist() == [4, 3]
    assert batch.supervised_tokens == 4


lengths = st.lists(st.tuples(st.integers(2, 30), st.integers(1, 30)), min_size=1, max_size=20)


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_an_epoch_meets_every_row_once_and_no_batch_exceeds_the_stated_shape(sizes, batch_size, grad_accum, seed):
    rows = [_row(length, min(length, supervised)) for length, supervised in sizes]
    shape = run_shape(rows, batch_size=batch_size, grad_accum=grad_accum, seed=seed, epochs=2)
    for epoch in range(2):
        seen = list(windows(rows, batch_size=batch_size, grad_accum=grad_accum, seed=seed, epoch=epoch))
        assert len(seen) == steps_per_epoch(len(rows), batch_size=batch_size, grad_accum=grad_accum)
        met = [int(length) for window in seen for batch in window for length in batch.row_lengths]
        assert sorted(met) == sorted(length for length, _ in sizes)
        for window in seen:
            assert 1 <= len(window) <= shape.batches
            for batch in window:
                assert len(batch.row_lengths) <= shape.rows
                assert len(batch.input_ids) <= shape.tokens
                assert batch.row_lengths.max() <= shape.longest_row
                assert batch.supervised_tokens <= shape.supervised


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, seed=1, epoch=0).tolist() == epoch_order(50, seed=1, epoch=0).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=1, epoch=1).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=2, epoch=0).tolist()


def test_batches_keep_the_order_given():
    batch, rest = batches([_row(2, 1), _row(3, 1), _row(4, 1)], 2)
    assert batch.row_lengths.tolist() == [2, 3]
    assert rest.row_lengths.tolist() == [4]


class _Conversation:
    def __init__(self, answer):
        self.turns = (Turn("user", "q"), Turn("assistant", answer))


def _encode(answers, seq_len, policy):
    return encode_rows([_Conversation(answer) for answer in answers], ENCODER, seq_len=seq_len, on_overlong=policy)


def test_rows_that_are_too_long_are_counted_under_every_policy():
    answers = ["short"] * 19 + ["x" * 200]
    dropped = _encode(answers, 64, "drop").counters()
    assert (dropped["rows"], dropped["rows_dropped_overlong"]) == (19, 1)
    cut = _encode(answers, 64, "truncate").counters()
    assert (cut["rows"], cut["rows_truncated"], cut["rows_dropped_overlong"]) == (20, 1, 0)
    whole = _encode(answers, 512, "error").counters()
    assert cut["supervised_tokens"] + cut["supervised_tokens_cut"] == whole["supervised_tokens"]
    with pytest.raises(DataError, match="1 of 20 rows are longer"):
        _encode(answers, 64, "error")


def test_the_default_refuses_to_lose_more_than_a_twentieth_of_the_rows():
    assert _encode(["short"] * 19 + ["x" * 200], 64, "auto").overlong_dropped == 1
    with pytest.raises(DataError, match="--on-overlong drop"):
        _encode(["short"] * 18 + ["x" * 200] * 2, 64, "auto")


def test_a_truncated_row_without_supervision_is_dropped_and_counted():
    counters = _encode(["short", "x" * 200], 23, "truncate").counters()
    assert counters["rows_dropped_unsupervised"] == 2 - counters["rows"]


def test_no_row_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="no row is left"):
        _encode(["x" * 200], 16, "drop")
