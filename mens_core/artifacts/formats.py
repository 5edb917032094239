"""The formats in which an adapter can be written."""

from __future__ import annotations

__all__ = ["FORMATS"]

#: Format → whose it is, for people.
FORMATS = {
    "peft": "Hugging Face PEFT's",
    "v2": "the older system's version 2, of an NF4 base",
    "v3": "the older system's version 3",
    "mlx": "mlx-lm's",
}
