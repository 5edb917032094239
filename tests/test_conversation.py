"""``chat``: every answer is what transformers says to all turns so far."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mens_core
from mens_core.cli import main
from mens_core.hf.hub import find_model

LENGTH = 12


@pytest.fixture(scope="module")
def lab():
    """The lab base as transformers opens it."""
    _, folder = find_model(None, None)
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def _answered(lab, turns):
    tokenizer, model = lab
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        found = model.generate(ids, do_sample=False, max_new_tokens=LENGTH, eos_token_id=stop, pad_token_id=stop)
    return tokenizer.decode(found[0, ids.shape[1] :]).partition("<|im_end|>")[0]


def _talk(monkeypatch, text, *words):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    return main(["chat", "--max-new-tokens", str(LENGTH), *words])


def test_a_piped_conversation_is_answered_as_transformers_answers_all_its_turns(backend, lab, monkeypatch, capsys):
    said = ["Write the body of a function that adds.", "And one that multiplies."]
    assert _talk(monkeypatch, f"{said[0]}\n\n{said[1]}".encode(), "--backend", backend.name) == 0
    turns, expected = [], []
    for prompt in said:
        turns.append({"role": "user", "content": prompt})
        expected.append(_answered(lab, turns))
        turns.append({"role": "assistant", "content": expected[-1]})
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
    # what was said before has a say
    assert expected[1] != _answered(lab, [{"role": "user", "content": said[1]}])


def test_a_turn_that_does_not_fit_is_an_error_and_no_part_of_the_conversation(monkeypatch, capsys):
    assert _talk(monkeypatch, b"Hello.\n" + b"x + y " * 4000, "--backend", "torch") == 2
    printed = capsys.readouterr()
    assert printed.out
    assert "the conversation has grown to" in printed.err
    conversation = mens_core.Conversation(backend="torch", max_new_tokens=4)
    first = conversation.answer("Hello.")
    with pytest.raises(mens_core.MensError, match="fewer than"):
        conversation.answer("x + y " * 4000)
    assert [turn.content for turn in conversation.turns] == ["Hello.", first]


def test_input_that_is_not_text_is_an_error(monkeypatch, capsys):
    assert _talk(monkeypatch, b"\xff\xfe\n", "--backend", "torch") == 2
    assert "the input is not text" in capsys.readouterr().err


def test_a_conversation_of_no_turns_ends_at_once(monkeypatch, capsys):
    assert _talk(monkeypatch, b"\n", "--backend", "torch") == 0
    assert capsys.readouterr().out == ""


def test_pieces_of_an_answer_are_the_answer_and_never_a_part_of_its_end_tag(backend):
    pieces = []
    conversation = mens_core.Conversation(backend=backend.name, max_new_tokens=48)
    answer = conversation.answer("Write the body of a function that adds.", pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == answer
    assert not any("<|im_end" in piece for piece in pieces)
    assert answer == mens_core.Conversation(backend=backend.name, max_new_tokens=48).answer(
        "Write the body of a function that adds."
    )


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["a", "b"]),
        ("a<|im_end|>b", ["a"]),
        ("a<b<|im_", ["a", "<b", "<|im_"]),
        ("é€", ["é", "€"]),
    ],
)
def test_a_piece_is_said_when_no_token_to_come_can_change_it(text, pieces):
    from mens_core.generation import _Speech, _turn

    encoder = mens_core.Conversation(backend="torch")._opened.encoder
    said = []
    speech = _Speech(encoder, said.append)
    # the lab tokenizer has a token a byte, so that a letter and a tag may have several
    tokens = list(text.encode())
    for token in tokens:
        speech.hear(token)
    speech.finish(_turn(encoder, tokens))
    assert said == pieces


def test_a_tokenizer_that_takes_its_words_back_has_the_whole_said_again():
    from mens_core.generation import _Speech

    said = []
    speech = _Speech(None, said.append)
    speech._say("do n")
    speech.finish("don't")
    assert said == ["do n", "\ndon't"]
