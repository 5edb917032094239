"""The suite that third parties run, on the JAX backend."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mens_core.testing.conformance import *  # noqa: F403
from mens_core.testing.conformance import OPEN, BackendCapabilities


class Capabilities(BackendCapabilities):
    """Everything."""

    backend = "jax"
    gpt2 = llama = qwen2 = qwen3 = OPEN
    qlora = dropout = patterns = whole = modules_to_save = bfloat16 = generate = merge = OPEN


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled():
    """Tiny graphs take longer to optimise than to run; ``tests/backends`` runs what XLA's own passes make of them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _compiled_for_itself(request):
    """What the tests' own cache keeps of a compilation is nothing that a hook wrote."""
    if request.node.name != "test_no_hook_writes_to_disk":
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
