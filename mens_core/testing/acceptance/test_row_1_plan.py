"""Rows 1a to 1d: the planner's choice and refusals, the names of tensors, the text, and the strict preflight."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mens_core import Planner
from mens_core.chat.chatml import ChatML
from mens_core.cli import main
from mens_core.corpus.row import Turn
from mens_core.errors import GateError
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import GRAPHS, read_layout
from mens_core.random_model import write_random_weights
from mens_core.testing.acceptance.materials import EMBEDDING, TINY, strict_fixture, write_rows
from mens_core.text.encode import Encoder
from mens_core.text.lab import lab_tokenizer
from mens_core.text.tokens import TokenRow

LABELS = {"lora": "burn_lora", "qlora": "candle_qlora"}
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"
EDGE = {"deployment_target": "mobile_edge", "seq_len": 64, "rank": 8, "alpha": 16.0, "batch_size": 1, "device": "cpu"}


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """A request that can be planned, on the fixture of row 1d with every tensor; tests change one thing."""
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": "w1 w2 w3", "response": "w2 w1 w3 w4"}] * 6)
    model = strict_fixture(tmp_path / "model", None, hidden=8)
    return {"model": str(model), "data_dir": tmp_path / "data", "output_dir": tmp_path / "run", "seq_len": 64}


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("method", LABELS)
def test_execution_planner_chooses_every_kernel_and_gives_it_the_runbooks_label(
    fields: dict[str, Any], backend: str, method: str
) -> None:
    plan = Planner().plan(**fields, backend=f"{backend}_{method}")
    assert (plan.execution_kernel, plan.runbook_kernel) == (f"{backend}_{method}", LABELS[method])
    assert plan.candle_compat_mode is (method == "qlora")
    assert not Path(fields["output_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"method": "lora", "base_quant": "nf4"}, "nf4_requires_qlora"),
        ({"method": "qlora", "base_quant": "none"}, "qlora_requires_nf4"),
        ({"method": "lora", "kernel": "candle_qlora"}, "forced_kernel_agrees"),
        ({"model": "."}, "config_json_exists"),
        (EDGE | {"seq_len": 513}, "mobile_edge_seq_len"),
        (EDGE | {"rank": 33}, "mobile_edge_rank"),
        (EDGE | {"batch_size": 2}, "mobile_edge_batch_size"),
        (EDGE | {"device": "cuda"}, "mobile_edge_device"),
        (EDGE | {"method": "qlora", "qlora_require_full_proxy_stack": True}, "mobile_edge_full_stack"),
        ({"max_memory": "1 MiB"}, "fits_memory"),
    ],
)
def test_execution_planner_refuses_with_the_code_of_the_gate(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(GateError) as refused:
        Planner().plan(**fields | changes)
    assert refused.value.codes == (code,)


def test_execution_planner_counts_the_proxy_inventory(fields: dict[str, Any], tmp_path: Path) -> None:
    partial = strict_fixture(tmp_path / "partial", {EMBEDDING})
    for folder, matched in ((fields["model"], 2), (str(partial), 0)):
        found = Planner().plan(**fields | {"model": folder}, backend="qlora").as_dict()
        assert found["candle_proxy_stack_eligible"] is True
        assert found["candle_proxy_stack_complete"] is (matched == 2)
        assert [found[f"candle_proxy_stack_keys_{name}"] for name in ("matched", "expected")] == [matched, 2]
    assert Planner().plan(**fields, backend="lora").as_dict()["candle_proxy_stack_eligible"] is False


def test_execution_planner_digest_is_of_the_contents_and_of_nothing_else(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    digest = Planner().plan(**fields).contract_digest
    moved = fields | {"model": str(Path(fields["model"]).rename(tmp_path / "moved")), "output_dir": tmp_path / "else"}
    assert Planner().plan(**moved).contract_digest == digest
    assert Planner().plan(**moved, seed=43).contract_digest != digest
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": "w1 w2 w3", "response": "w2 w1 w3 w3"}] * 6)
    assert Planner().plan(**moved).contract_digest != digest


RUNBOOK_KEYS = {
    "gpt2": {"transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight"},
    "llama": {EMBEDDING, "lm_head.weight", O_PROJ.format(1)},
    "qwen2": {EMBEDDING, O_PROJ.format(0), "model.layers.1.self_attn.q_proj.bias"},
    "qwen3": {EMBEDDING, O_PROJ.format(1), "model.layers.0.self_attn.q_norm.weight"},
}


@pytest.mark.parametrize("family", GRAPHS)
def test_hf_keymap_is_the_state_dict_of_transformers(tmp_path: Path, family: str) -> None:
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    write_random_weights(tmp_path, arch=family, size=TINY, vocab_size=97)
    shapes = tensor_shapes(read_layout(tmp_path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert shapes == expected
    assert set(shapes) >= RUNBOOK_KEYS[family]


CHATML = ChatML(lab_tokenizer())
CONVERSATION = (
    Turn("system", "be brief"),
    Turn("user", "hi <|im_end|>"),
    Turn("assistant", "hello"),
    Turn("user", "again"),
    Turn("assistant", "hello, hello"),
)


def test_training_text_is_chatml_and_supervises_the_answers_alone() -> None:
    rendered = CHATML.render(CONVERSATION)
    assert rendered.text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\nhello, hello<|im_end|>"
    )
    answers = [rendered.text[start:end] for start, end in rendered.supervised]
    assert answers == ["hello<|im_end|>", "hello, hello<|im_end|>"]
    assert rendered.text.startswith(CHATML.prompt(CONVERSATION[:-1]).text)


def test_training_text_trains_on_the_tokens_of_the_answers_and_their_ends() -> None:
    tokenizer: Tokenizer = lab_tokenizer()
    (row,) = Encoder(tokenizer, CHATML).encode([CHATML.render(CONVERSATION)])
    assert isinstance(row, TokenRow)
    trained = row.input_ids[row.supervised].tolist()
    decoded = tokenizer.decode(trained, skip_special_tokens=False)
    assert decoded == "hello<|im_end|>hello, hello<|im_end|>"
    # A tag that a user quotes is text, and no token that ends a turn.
    assert row.input_ids.tolist().count(tokenizer.token_to_id("<|im_end|>")) == len(CONVERSATION)


def _words(fields: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


@pytest.mark.parametrize("backend", ["qlora", "lora"])
def test_preflight_strict_rejects_missing_o_proj(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    flags = [f"--backend={backend}", "--tokenizer=hf", "--qlora-require-full-proxy-stack"]
    assert main(["plan", *_words(fields), *flags]) == 0
    partial = fields | {"model": strict_fixture(tmp_path / "partial", {EMBEDDING})}
    for verb in ("plan", "train"):
        capsys.readouterr()
        assert main([verb, *_words(partial), *flags]) == 2
        error = capsys.readouterr().err
        assert "strict proxy stack: 0 of 2" in error
        assert all(O_PROJ.format(layer) in error for layer in range(2))
    assert not Path(fields["output_dir"]).exists()
    # Without the strict rule a plan is made all the same, and says what a run would be refused for.
    assert main(["plan", *_words(partial), *flags[:2]]) == 2
    assert O_PROJ.format(0) in capsys.readouterr().out
