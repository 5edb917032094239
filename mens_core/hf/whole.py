"""Which modules of a known family can be trained whole beside an adapter, as PEFT's ``modules_to_save`` are.

Embeddings, the head and norms: what is no linear layer of the decoder and has a weight. A head that is tied to the
embedding is a module as well: trained whole it is a copy of its own, and the embedding stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from mens_core.hf.fit import HEAD
from mens_core.hf.keymap import linear_shapes, tensor_shapes
from mens_core.hf.layout import Layout

__all__ = ["TABLES", "names_module", "untrained_row", "whole_modules", "whole_shapes"]

TABLES = ("transformer.wte.weight", "model.embed_tokens.weight")
"""Names of the token embedding."""


def whole_modules(layout: Layout) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module path → name of each of its tensors → shape; nothing for a family that the core does not know."""
    if layout.family is None:
        return {}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    linears = linear_shapes(layout)
    for name, shape in {**tensor_shapes(layout), HEAD: (layout.vocab_size, layout.hidden_size)}.items():
        path, _, part = name.rpartition(".")
        if part in {"weight", "bias"} and path not in linears and not path.endswith(".conv1d"):
            modules.setdefault(path, {})[name] = shape
    return modules


def whole_shapes(layout: Layout, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of all modules that are named; a name that fits none adds nothing."""
    names = tuple(names)
    return {
        name: shape
        for path, tensors in (whole_modules(layout) if names else {}).items()
        if any(names_module(name, path) for name in names)
        for name, shape in tensors.items()
    }


def names_module(name: str, path: str) -> bool:
    """Whether a name is a module's whole path or the end of it, from a dot on."""
    return f".{path}".endswith(f".{name}")


def untrained_row(layout: Layout) -> int | None:
    """The row of the token embedding that gets no gradient, as in transformers: the padding token's; GPT-2 has none."""
    row = layout.config.get("pad_token_id")
    if layout.family == "gpt2" or not isinstance(row, int):
        return None
    return row % layout.vocab_size if -layout.vocab_size <= row < layout.vocab_size else None
