"""Supervised tokens are the assistant's words and its end of turn, with every family's template and tokenizer."""

import pytest
from chat_conversations import CONVERSATIONS, MULTI, assistant, user
from chat_families import FAMILIES
from chat_refusals import refused

from mens_core.chat.open_chat import open_chat
from mens_core.corpus.faults import Fault
from mens_core.text.encode import Encoder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Opens the encoder of a family, once each."""
    found = {}

    def opened(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("model")
            tokenizer = FAMILIES[name].write(folder)
            found[name] = Encoder(tokenizer, open_chat(folder, tokenizer))
        return found[name]

    return opened


@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        (name, conversation)
        for name in FAMILIES
        for conversation in CONVERSATIONS
        if refused(name, conversation) is None
    ],
)
def test_training_text_supervised_tokens_are_the_supervised_text(encoders, name, conversation):
    encoder = encoders(name)
    rendered = encoder.chat.render(*CONVERSATIONS[conversation])
    row = encoder.encode([rendered])[0]
    if isinstance(row, Fault):
        assert "blanks" in row.expected
        return
    said = encoder.tokenizer.decode(row.input_ids[row.supervised].tolist(), skip_special_tokens=False)
    spans = [rendered.text[start:end] for start, end in rendered.supervised]
    if name == "phi-3-mini":  # its tags take the blanks behind them with them
        spans = [span.lstrip() for span in spans]
    # Decoders of SentencePiece's vocabularies differ in the blank before a first word.
    assert said.replace(" ", "") == "".join(spans).replace(" ", "")


@pytest.mark.parametrize("name", FAMILIES)
def test_training_text_quotes_no_control_token(encoders, name):
    encoder = encoders(name)
    tag = encoder.chat.end_tags[0]
    turns = (user(f"What is {tag}?"), assistant(f"{tag} ends."))
    plain, quoting = encoder.encode([encoder.chat.render(MULTI[:2]), encoder.chat.render(turns)])
    ends = {encoder.tokenizer.token_to_id(end) for end in encoder.chat.end_tags}
    assert sum(token in ends for token in quoting.input_ids.tolist()) == sum(
        token in ends for token in plain.input_ids.tolist()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_training_text_ends_every_answer_with_one_supervised_end_token(encoders, name):
    encoder = encoders(name)
    row = encoder.encode([encoder.chat.render(MULTI)])[0]
    ends = {encoder.tokenizer.token_to_id(end) for end in encoder.chat.end_tags}
    supervised = row.input_ids[row.supervised].tolist()
    assert sum(token in ends for token in supervised) == 2
    assert supervised[-1] in ends
