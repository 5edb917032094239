"""Whether the tensors of a folder are those that its config.json asks for, by their headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mens_core.errors import printable
from mens_core.hf.header import FLOATS, TensorInfo
from mens_core.hf.keymap import canonical_name, tensor_shapes
from mens_core.hf.layout import Layout

__all__ = ["HEAD", "MISFITS", "misfits"]

HEAD = "lm_head.weight"
"""Name of the output projection, which a folder may hold although config.json ties it to the embedding."""

MISFITS = ("missing", "left_over", "shape", "dtype")

# Masks and rotary tables that older versions of transformers saved beside the weights, and towers that are not text.
_PASSED_OVER = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|^(model\.)?visual\.|^mtp\.")


def misfits(layout: Layout, tensors: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """Compare names, shapes and number formats.

    Args:
        layout: what config.json says, of a known family.
        tensors: name as stored → what its header says.

    Returns:
        Kind out of ``MISFITS`` → one sentence for each tensor, in order of the names; a head that is tied may be
        stored all the same.

    Raises:
        ModelError: if the core does not know the family.
    """
    wanted = tensor_shapes(layout)
    named = {canonical_name(layout, name): info for name, info in tensors.items() if not _PASSED_OVER.search(name)}
    if layout.tied:
        named.pop(HEAD, None)
    both = sorted(set(wanted) & set(named))
    return {
        "missing": [f"{name} is missing" for name in sorted(set(wanted) - set(named))],
        "left_over": [f"{printable(name)} is left over" for name in sorted(set(named) - set(wanted))],
        "shape": [
            f"{name} has shape {named[name].shape}, the config asks for {wanted[name]}"
            for name in both
            if named[name].shape != wanted[name]
        ],
        "dtype": [
            f"{name} is stored as {named[name].dtype}, not as floating-point numbers"
            for name in both
            if named[name].dtype not in FLOATS
        ],
    }
