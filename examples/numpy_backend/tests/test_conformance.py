"""mens-core's conformance suite on this backend."""

from mens_core.testing.conformance import *  # noqa: F403
from mens_core.testing.conformance import OPEN, BackendCapabilities, closed


class Capabilities(BackendCapabilities):
    """What is written here, and why the rest is not."""

    backend = "numpy"
    gpt2 = llama = qwen2 = qwen3 = OPEN
    dropout = patterns = whole = generate = merge = OPEN
    modules_to_save = closed("A and B alone are trained here")
    qlora = closed("there is no NF4 base in NumPy here")
    bfloat16 = closed("NumPy computes in float32")
