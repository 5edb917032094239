"""The lab tokenizer: every byte has its id, and nothing is lost in either direction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mens_core.errors import DataError
from mens_core.text import lab

# Surrogates are no text: they have no UTF-8 form.
texts = st.text(st.characters(exclude_categories=["Cs"]))
with_tags = st.lists(st.one_of(texts, st.sampled_from(lab.SPECIAL_TOKENS)), max_size=6).map("".join)


@given(st.binary())
def test_any_bytes_come_back_as_they_went_in(data: bytes) -> None:
    assert lab.decode_bytes(lab.encode_bytes(data)) == data


@given(texts)
def test_the_library_encodes_text_as_its_utf8_bytes(text: str) -> None:
    tokenizer = lab.lab_tokenizer()
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == lab.encode_bytes(text.encode())


@given(with_tags)
def test_the_library_decodes_what_it_encoded(text: str) -> None:
    tokenizer = lab.lab_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(with_tags)
def test_tags_inside_content_stay_content_when_asked(text: str) -> None:
    tokenizer = lab.lab_tokenizer()
    tokenizer.encode_special_tokens = True
    assert all(token < lab.NUM_BYTES for token in tokenizer.encode(text).ids)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tags_become_control_tokens_by_default() -> None:
    ids = lab.lab_tokenizer().encode("<|im_start|>a<|im_end|><|endoftext|>").ids
    assert ids == [lab.TURN_START_ID, ord("a"), lab.TURN_END_ID, lab.END_OF_TEXT_ID] == [257, 97, 258, 256]


def test_each_id_below_256_is_the_byte_of_that_value() -> None:
    tokenizer = lab.lab_tokenizer()
    assert tokenizer.get_vocab_size(with_added_tokens=True) == lab.VOCABULARY_TOKENS == 259
    tokens = [tokenizer.id_to_token(value) for value in range(256)]
    assert [tokens[ord(c)] for c in "A !~"] == ["A", "Ġ", "!", "~"]
    assert [tokens[value] for value in (0, 10, 127, 173, 255)] == ["Ā", "Ċ", "ġ", "Ń", "ÿ"]


@pytest.mark.parametrize("bad", [lab.END_OF_TEXT_ID, -1, 10_000])
def test_an_id_that_is_no_byte_is_refused_with_its_position(bad: int) -> None:
    with pytest.raises(DataError, match=f"id {bad} is not a byte\n.*position 1 of 3"):
        lab.decode_bytes([97, bad, 98])


def test_the_written_files_open_in_the_library_and_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lab.write_lab_tokenizer(tmp_path / "new" / "folder", max_length_tokens=77)
    folder = tmp_path / "new" / "folder"
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    text = "  def f(x):\n\treturn 'é ← 日本'\n<|im_end|>"
    assert opened(text)["input_ids"] == lab.lab_tokenizer().encode(text).ids
    assert opened.decode(opened(text)["input_ids"]) == text
    assert (opened.eos_token_id, opened.pad_token_id, opened.model_max_length) == (256, 256, 77)
    assert len(opened) == lab.VOCABULARY_TOKENS
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() == lab.lab_tokenizer().to_str()
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_chat_template_puts_newlines_between_turns_and_none_after_the_last(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lab.write_lab_tokenizer(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Yo"}]
    whole = opened.apply_chat_template(turns, tokenize=False)
    assert whole == "<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"
    opened_turn = opened.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert opened_turn == "<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n"
    assert whole.startswith(opened_turn)


def test_writing_refuses_a_length_of_zero_and_a_path_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_length_tokens = 0"):
        lab.write_lab_tokenizer(tmp_path, max_length_tokens=0)
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken"):
        lab.write_lab_tokenizer(tmp_path / "taken")


def test_writing_again_replaces_what_was_there(tmp_path: Path) -> None:
    lab.write_lab_tokenizer(tmp_path, max_length_tokens=8)
    lab.write_lab_tokenizer(tmp_path, max_length_tokens=16)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_texts_are_not_kept_once_they_are_encoded() -> None:
    code = """
import sys
from pathlib import Path
from mens_core.text.lab import lab_tokenizer

def private():
    told = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(told.split("RssAnon:")[1].split()[0]) / 1024

tokenizer = lab_tokenizer()
if sys.argv[1] == "kept":
    tokenizer.model = type(tokenizer.model)(vocab=tokenizer.get_vocab(with_added_tokens=False), merges=[])
tokenizer.encode("a")
before = private()
for start in range(10_000, 20_000, 100):
    tokenizer.encode_batch_fast([f"{place}" * 48 for place in range(start, start + 100)])
print(private() - before)
"""
    grown = {
        way: float(subprocess.run([sys.executable, "-c", code, way], check=True, capture_output=True, text=True).stdout)
        for way in ("as it is", "kept")
    }
    # A hundred texts at a time take little; ten thousand that are kept take 24 bytes a letter and more.
    assert grown["as it is"] < 20
    assert grown["kept"] > 40, "the twin"
