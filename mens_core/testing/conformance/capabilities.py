"""What a backend says of itself: every capability is open, or closed with a reason."""

from __future__ import annotations

from typing import Any

import attrs

__all__ = ["CAPABILITIES", "OPEN", "BackendCapabilities", "Closed", "closed", "declaration_problems"]

CAPABILITIES = {
    "gpt2": "models of model_type gpt2",
    "llama": "models of model_type llama",
    "qwen2": "models of model_type qwen2",
    "qwen3": "models of model_type qwen3",
    "qlora": "method qlora: mens_open with an NF4 base, mens_quantize and mens_dequantize",
    "dropout": "dropout of the adapter's input in mens_step",
    "patterns": "ranks and scales of their own, by rank_pattern and alpha_pattern: an offer with patterns",
    "whole": "tensors of a plan that take the base's places: an offer with whole",
    "modules_to_save": "modules that are trained whole, by modules_to_save: an offer with modules_to_save",
    "bfloat16": "a base in bfloat16",
    "generate": "mens_generate",
    "merge": "mens_merge",
}
"""Name → what is meant. Method ``lora`` in float32 with every other hook is no capability: a backend has it."""


@attrs.frozen
class Closed:
    """A capability that is not there; the tests that need it are skipped with the reason.

    Attributes:
        reason: one sentence.
    """

    reason: str


OPEN = True
"""A capability that is there and is tested."""


def closed(reason: str) -> Closed:
    """Declare that a capability is not there, and why. That it works all the same is then a failure."""
    return Closed(reason)


class BackendCapabilities:
    """Base of the class ``Capabilities`` that a test module defines beside ``from … import *``.

    Each name of ``CAPABILITIES`` is set to ``OPEN`` or ``closed("reason")``; nothing is assumed.

    Attributes:
        backend: the entry point's name.
        device: where to test; ``cpu`` unless the backend has none.
    """

    backend: str
    device: str = "cpu"


def declaration_problems(declared: Any) -> list[str]:
    """What is wrong with a class of capabilities, one sentence each."""
    if not (isinstance(declared, type) and issubclass(declared, BackendCapabilities)):
        return ["the test module defines no class Capabilities(BackendCapabilities)"]
    names = {name for name in dir(declared) if not name.startswith("_")} - {"backend", "device"}
    problems = [] if isinstance(getattr(declared, "backend", None), str) else ["backend is not the name of one"]
    problems += [f"{name} is not declared: OPEN, or closed(reason)" for name in CAPABILITIES if name not in names]
    problems += [f"{name} is no capability" for name in sorted(names - set(CAPABILITIES))]
    for name in sorted(names & set(CAPABILITIES)):
        value = getattr(declared, name)
        if value is not OPEN and not (isinstance(value, Closed) and value.reason.strip()):
            problems.append(f"{name} is {value!r}, neither OPEN nor closed with a reason")
    return problems
