"""The suite that third parties run, on the torch backend."""

from mens_core.testing.conformance import *  # noqa: F403
from mens_core.testing.conformance import OPEN, BackendCapabilities


class Capabilities(BackendCapabilities):
    """Everything."""

    backend = "torch"
    gpt2 = llama = qwen2 = qwen3 = OPEN
    qlora = dropout = patterns = whole = modules_to_save = bfloat16 = generate = merge = OPEN
