"""The lab base that the package ships: small, complete, opened by anyone, and better than a table of pairs."""

from importlib import resources
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mens_core.text.lab import END_OF_TEXT_ID, TURN_END_ID, lab_tokenizer

FOLDER = Path(str(resources.files("mens_core"))) / "lab_base"

UNSEEN = '''\
def moving_average(readings, width):
    """Return the averages of ``width`` neighbouring readings."""
    if width < 1:
        raise ValueError("width must be at least 1")
    total = sum(readings[:width])
    averages = [total / width]
    for index in range(width, len(readings)):
        total += readings[index] - readings[index - width]
        averages.append(total / width)
    return averages
'''


def test_the_folder_is_whole_and_at_most_eight_megabytes():
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in FOLDER.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_its_tokenizer_is_the_lab_tokenizer():
    assert Tokenizer.from_file(str(FOLDER / "tokenizer.json")).to_str() == lab_tokenizer().to_str()


def test_transformers_opens_it_without_a_missing_key_and_finds_the_end_of_a_turn():
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert {name: list(keys) for name, keys in report.items() if keys} == {}
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.eos_token_id == [END_OF_TEXT_ID, TURN_END_ID]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_it_predicts_code_it_has_not_seen_better_than_pairs_of_bytes_would():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = torch.tensor([lab_tokenizer().encode(UNSEEN).ids])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # 2.4 nats per byte is where a table of byte pairs ends on this data; the base was measured at 0.80 here.
    assert loss < 1.2
