"""Greedy decoding with a key/value cache, in two compiled functions.

::

    prompt ─▶ _begin: all its tokens at once ─▶ cache, first token ─▶ _go_on: token by token, as far as it is told
                      by a scan over the layers                        on a CPU each layer by itself

Where somebody listens it is told to go one token further each time, else to the end at once.

The cache's length is static: prompt and answer, rounded up, so that like requests share a compilation.
Shape letters: M places of the cache, T tokens, H query heads, K key/value heads, G = H / K, E head width.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from mens_core.errors import DataError
from mens_core.exchange import GenerateSettings
from mens_jax._adamw import Numbers
from mens_jax._arrays import dot
from mens_jax._blocks import scan_blocks
from mens_jax._sizes import rounded_up
from mens_jax._structure import Structure
from mens_jax.model import Model
from mens_jax.step import Session

__all__ = ["generate"]


def generate(
    session: Session,
    prompt: Sequence[int],
    settings: GenerateSettings,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue a prompt with the likeliest token, again and again.

    Args:
        session: from ``open_session``.
        prompt: at least one token id.
        settings: length and stop tokens.
        on_token: called with each new token as soon as it is known.

    Returns:
        The new tokens only; a stop token ends them and is included.

    Raises:
        DataError: if the prompt is empty, or a model with learned positions has too few of them.
    """
    if not prompt:
        raise DataError("the prompt is empty", expected="at least one token")
    layout, longest = session.plan.layout, len(prompt) + settings.max_new_tokens
    if layout.family == "gpt2" and longest > layout.max_positions:
        raise DataError(
            f"prompt and answer of up to {longest} tokens do not fit the model's {layout.max_positions} positions",
            fix="a shorter prompt, or fewer new tokens",
        )
    width = rounded_up(len(prompt))
    ids = np.zeros(width, np.int32)
    ids[: len(prompt)] = prompt
    model = session.structure, session.frozen, session.trained.adapter
    layers = _layers_apart(session.structure.model(session.frozen, session.trained.adapter))
    places = layout.num_layers, max(width, rounded_up(longest)), layout.num_kv_heads, layout.head_dim
    length, stops = np.int32(len(prompt)), _stops(settings.stop_tokens)
    answer = _begin(*model, places, layers is not None, ids, length, stops)
    if on_token is None:
        answer = _go_on(*model, layers, answer, np.int32(settings.max_new_tokens), length, stops)
        return _tokens(answer)
    on_token(_tokens(answer)[-1])
    while int(answer.length) < settings.max_new_tokens and not bool(answer.stopped):
        answer = _go_on(*model, layers, answer, np.int32(answer.length + 1), length, stops)
        on_token(_tokens(answer)[-1])
    return _tokens(answer)


def _tokens(answer: _Answer) -> list[int]:
    tokens: list[int] = np.asarray(answer.tokens)[: int(answer.length)].tolist()
    return tokens


def _stops(tokens: tuple[int, ...]) -> NDArray[np.int32]:
    """Filled up with what is no token, so that the number of stop tokens is not compiled in."""
    stops = np.full(-(-max(1, len(tokens)) // 8) * 8, -1, np.int32)
    stops[: len(tokens)] = tokens
    return stops


class _Cache(NamedTuple):
    """Keys and values of a layer, (M, K, E) each; with the layers in front where they are stacked."""

    key: Array
    value: Array


_Layers: TypeAlias = "tuple[nnx.State, ...] | None"
_Caches: TypeAlias = "tuple[_Cache, ...] | _Cache"


class _Answer(NamedTuple):
    """The loop's state: the cache, the tokens so far (M,), their number, and whether a stop token was met."""

    cache: _Caches
    tokens: Array
    length: Array
    stopped: Array


def _layers_apart(model: Model) -> _Layers:
    """On a CPU, each layer's arrays as views into the stacks; elsewhere None.

    Where a scan takes a layer out of its stack XLA copies it on a CPU, which for a single token takes twice as long
    as the products with it.
    """
    leaves, structure = jax.tree.flatten(nnx.state(model.decoder.blocks))
    device = next(iter(leaves[0].devices()))
    if device.platform != "cpu":
        return None
    stacks = [np.asarray(leaf) for leaf in leaves]
    layers = range(len(stacks[0]))
    return tuple(
        jax.tree.unflatten(structure, [jax.device_put(stack[layer], device) for stack in stacks]) for layer in layers
    )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _begin(
    structure: Structure,
    frozen: nnx.State,
    adapter: Numbers,
    cache_shape: tuple[int, int, int, int],
    apart: bool,
    prompt: Array,
    length: Array,
    stops: Array,
) -> _Answer:
    model = structure.model(frozen, adapter)
    empty, zero = jnp.zeros(cache_shape, model.head.dtype), jnp.zeros((), jnp.int32)
    hidden, cache = _extend(model, _Cache(empty, empty), prompt, zero)
    if apart:
        cache = tuple(jax.tree.map(operator.itemgetter(layer), cache) for layer in range(cache_shape[0]))
    start = _Answer(cache, jnp.zeros(cache_shape[1], jnp.int32), zero, stopped=zero > 0)
    return _append(model, start, cache, hidden[length - 1], stops)


# The cache is changed where it is.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _go_on(
    structure: Structure,
    frozen: nnx.State,
    adapter: Numbers,
    layers: _Layers,
    answer: _Answer,
    most: Array,
    length: Array,
    stops: Array,
) -> _Answer:
    """Tokens until there are ``most``, or a stop token was met; the prompt had ``length``."""
    model = structure.model(frozen, adapter)

    def one_more(answer: _Answer) -> _Answer:
        last = answer.tokens[answer.length - 1][None]
        hidden, cache = _extend(model, answer.cache, last, length + answer.length - 1, layers)
        return _append(model, answer, cache, hidden[0], stops)

    return lax.while_loop(lambda answer: (answer.length < most) & ~answer.stopped, one_more, answer)


def _append(model: Model, answer: _Answer, cache: _Caches, hidden: Array, stops: Array) -> _Answer:
    token = dot(hidden, model.head.T, jnp.float32).argmax().astype(jnp.int32)
    tokens = answer.tokens.at[answer.length].set(token)
    return _Answer(cache, tokens, answer.length + 1, (stops == token).any())


def _extend(
    model: Model, cache: _Caches, input_ids: Array, start: Array, layers: _Layers = None
) -> tuple[Array, _Caches]:
    """Run tokens that follow ``start`` earlier ones: their hidden states (T, D) and the longer cache.

    Tokens that only fill up the prompt's shape come last; what they leave in the cache is overwritten before any
    real token can see it.
    """
    positions = start + jnp.arange(len(input_ids), dtype=jnp.int32)
    hidden, rotary = model.decoder.embed(input_ids, positions)

    def run(block: Callable[..., Array], hidden: Array, layer: _Cache) -> tuple[Array, _Cache]:
        longer = layer

        def attend(query: Array, key: Array, value: Array, scale: float, window: Array | None) -> Array:
            nonlocal longer
            longer = _Cache(
                lax.dynamic_update_slice_in_dim(layer.key, key, start, 0),
                lax.dynamic_update_slice_in_dim(layer.value, value, start, 0),
            )
            return _attend_cached(query, longer, positions, scale, window)

        return block(hidden, rotary, attend), longer

    blocks = model.decoder.blocks
    if layers is None:
        hidden, longer = scan_blocks(blocks, hidden, run, cache)
        return model.decoder.norm_out(hidden), longer
    graph, parts = nnx.graphdef(blocks), list[_Cache]()
    for weights, layer in zip(layers, cast("tuple[_Cache, ...]", cache), strict=True):
        hidden, part = run(nnx.merge(graph, weights), hidden, layer)
        parts.append(part)
    return model.decoder.norm_out(hidden), tuple(parts)


def _attend_cached(query: Array, cache: _Cache, positions: Array, scale: float, window: Array | None) -> Array:
    """(T, H, E) queries against M places; a place is seen up to the query's own position."""
    tokens, _, width = query.shape
    places, heads, _ = cache.key.shape
    query = query.reshape(tokens, heads, -1, width).transpose(1, 2, 0, 3).reshape(heads, -1, width)  # K GT E
    scores = dot(query, cache.key.transpose(1, 2, 0), jnp.float32) * scale
    behind = positions[:, None] - jnp.arange(places)
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    scores = jnp.where(seen, scores.reshape(heads, -1, tokens, places), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(heads, -1, places)
    output = dot(weights, cache.value.transpose(1, 0, 2)).reshape(heads, -1, tokens, width)
    return output.transpose(2, 0, 1, 3).reshape(tokens, -1, width)
