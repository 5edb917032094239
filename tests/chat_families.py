"""The published chat templates in ``data/chat_templates``, each with a tiny tokenizer of its family."""

import json
from pathlib import Path

import attrs
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mens_core.text.lab import lab_tokenizer

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"


@attrs.frozen
class Family:
    """What a model's folder says beside its template.

    Attributes:
        name: of the template's file.
        special: added tokens that are special.
        plain: added tokens that are not.
        tokens: as tokenizer_config.json names them.
        stops: texts of the tokens in generation_config.json's eos_token_id.
        kind: of the tokenizer: bytes, prepend (Llama 2), metaspace (Mistral) or replace (Gemma).
    """

    name: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    tokens: dict = attrs.field(factory=dict)
    stops: tuple[str, ...] = ()
    kind: str = "bytes"

    @property
    def template(self):
        """Its source."""
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")

    def tokenizer(self):
        """A tokenizer of single characters, with the family's special tokens."""
        tokenizer = _KINDS[self.kind]()
        rstrip = self.name.startswith("phi-3")  # Phi-3's tags take the blanks behind them
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip=rstrip) for text in self.special])
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in self.plain])
        return tokenizer

    def write(self, folder, template=None):
        """Write the folder of a model of this family; returns its tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        stops = [tokenizer.token_to_id(text) for text in self.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
        source = self.template if template is None else template
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        return tokenizer


def _bytes():
    # Without the lab's own special tokens, which ChatML's families name themselves.
    described = json.loads(lab_tokenizer().to_str())
    return Tokenizer.from_str(json.dumps(described | {"added_tokens": []}))


def _sentencepiece(*, space):
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *map(chr, range(33, 127))]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        unk_token=pieces[0],
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if space == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


_KINDS = {
    "bytes": _bytes,
    "prepend": lambda: _sentencepiece(space="prepend"),
    "metaspace": lambda: _sentencepiece(space="first"),
    "replace": lambda: _sentencepiece(space="replace"),
}

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_MISTRAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>"}
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_PLAIN = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    *(f"<｜tool▁{part}▁{end}｜>" for part in ("calls", "call", "outputs", "output") for end in ("begin", "end")),
    "<｜tool▁sep｜>",
)
_DEEPSEEK_TOKENS = {
    "bos_token": {"__type": "AddedToken", "content": _DEEPSEEK[0], "lstrip": False, "rstrip": False},
    "eos_token": {"__type": "AddedToken", "content": _DEEPSEEK[1], "lstrip": False, "rstrip": False},
}
_HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>")

FAMILIES = {
    family.name: family
    for family in (
        Family("llama-2-7b-chat", ("<unk>", "<s>", "</s>"), (), _SENTENCEPIECE, ("</s>",), "prepend"),
        Family("llama-3-8b-instruct", _LLAMA3, (), _LLAMA3_TOKENS, _LLAMA3_STOPS),
        Family("llama-3-generation", _LLAMA3, (), _LLAMA3_TOKENS, _LLAMA3_STOPS),
        Family("llama-3.1-8b-instruct", _LLAMA3, (), _LLAMA3_TOKENS, _LLAMA3_STOPS),
        Family("llama-3.2-3b-instruct", _LLAMA3, (), _LLAMA3_TOKENS, _LLAMA3_STOPS),
        Family("qwen2.5-7b-instruct", _CHATML, _QWEN_PLAIN[:2], _QWEN, _CHATML[::-2]),
        Family("qwen3-0.6b", _CHATML, _QWEN_PLAIN, _QWEN, _CHATML[::-2]),
        Family("qwen3-generation", _CHATML, _QWEN_PLAIN, _QWEN, _CHATML[::-2]),
        Family("qwq-32b", _CHATML, _QWEN_PLAIN, _QWEN, _CHATML[::-2]),
        Family("smollm2-1.7b-instruct", _CHATML, (), _QWEN | {"bos_token": "<|im_start|>"}, ("<|im_end|>",)),
        Family("smollm3-3b", _CHATML, _QWEN_PLAIN, _QWEN, ("<|im_end|>",)),
        Family(
            "gemma-2-2b-it", ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), (), _GEMMA, (), "replace"
        ),
        Family(
            "gemma-3-4b-it",
            ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
            (),
            _GEMMA,
            ("<eos>", "<end_of_turn>"),
            "replace",
        ),
        Family("mistral-7b-instruct-v0.1", ("<unk>", "<s>", "</s>"), (), _SENTENCEPIECE, ("</s>",), "prepend"),
        Family("mistral-7b-instruct-v0.3", _MISTRAL, (), _SENTENCEPIECE, ("</s>",), "metaspace"),
        Family("mistral-nemo", _MISTRAL, (), _SENTENCEPIECE, ("</s>",)),
        Family(
            "phi-3-mini",
            ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
            (),
            {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
            ("<|endoftext|>", "<|assistant|>", "<|end|>"),
            "prepend",
        ),
        Family(
            "phi-4",
            (*_CHATML, "<|im_sep|>"),
            (),
            {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
            ("<|im_end|>",),
        ),
        Family(
            "gpt-oss-120b",
            (*_HARMONY, "<|message|>", "<|call|>"),
            (),
            {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
            ("<|return|>", "<|endoftext|>", "<|call|>"),
        ),
        Family("deepseek-v3", _DEEPSEEK, _DEEPSEEK_PLAIN, _DEEPSEEK_TOKENS),
        Family("deepseek-r1-distill", _DEEPSEEK, _DEEPSEEK_PLAIN, _DEEPSEEK_TOKENS),
        Family("deepseek-v3.1", _DEEPSEEK, _DEEPSEEK_PLAIN, _DEEPSEEK_TOKENS),
    )
}
