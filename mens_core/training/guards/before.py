"""Before the first step: is there something to train, something to train it on, and does the base work?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mens_core.costs import adapted_linears
from mens_core.exchange import TrainingState
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import Layout
from mens_core.hf.whole import whole_shapes
from mens_core.plan import BaseWeights
from mens_core.sections import AdapterSpec
from mens_core.text.encode import Encoder
from mens_core.text.tokens import TokenRows
from mens_core.training.guards.verdict import Verdict

__all__ = [
    "adapter_identity",
    "end_of_turn_supervised",
    "every_window_supervised",
    "first_loss",
    "ids_in_vocabulary",
    "trainable_set",
    "zero_rate",
]

# Of ln V: within a tenth of it a base is called random, below half of it trained.
_NEAR, _FAR = 0.1, 0.5
# Tokens that are looked at in one go, since the rows may be larger than the memory.
_AT_ONCE = 1 << 22
# Rows whose text is looked at where the end of a turn is no token of its own.
_ROWS_READ = 1000


def trainable_set(adapter: dict[str, tuple[int, ...]], layout: Layout, spec: AdapterSpec) -> Verdict:
    """The session trains exactly what the contract says, and not nothing.

    Args:
        adapter: tensor name → shape, as the session states them.
        layout: of the base; of a family that the core does not know, only names and ranks are judged.
        spec: of the contract.
    """
    code, fix = "trainable_set", "check --targets; if they are right, report it to the backend's authors"
    if not adapter:
        return Verdict(code=code, passed=False, message="the adapter has no tensor: nothing to train", fix=fix)
    pairs: dict[str, tuple[int, int]] = {
        name.removesuffix(".lora_A.weight"): (
            adapter.get(name.replace(".lora_A.", ".lora_B."), (0,))[0],
            shape[-1],
        )
        for name, shape in adapter.items()
        if name.endswith(".lora_A.weight")
    }
    linears = pairs if layout.family is None else linear_shapes(layout)
    wanted = adapted_linears(BaseWeights(parameters=0, stored_bytes=0, linears=linears), spec)
    ranks = {path: spec.rank_of(path) for path in wanted}
    expected = whole_shapes(layout, spec.modules_to_save)
    expected |= {f"{path}.lora_A.weight": (ranks[path], into) for path, (_, into) in wanted.items()}
    expected |= {f"{path}.lora_B.weight": (out, ranks[path]) for path, (out, _) in wanted.items()}
    wrong = sorted(name for name in {**adapter, **expected} if adapter.get(name) != expected.get(name))
    numbers = {"tensors": len(adapter), "expected": len(expected), "wrong": len(wrong)}
    if wrong:
        name = wrong[0]
        found, asked = (_shape(side.get(name)) for side in (adapter, expected))
        message = f"{len(wrong)} of the adapter's tensors are not as asked for, such as {name}: {found}, not {asked}"
        return Verdict(code=code, passed=False, message=message, numbers=numbers, fix=fix)
    held = sorted({*ranks.values()})
    modules = f"{len(wanted)} linear layers of rank {held[0]}" + (f" to {held[-1]}" if held[1:] else "")
    modules += f" and {len(expected) - 2 * len(wanted)} tensors whole" if spec.modules_to_save else ""
    return Verdict(code=code, passed=True, message=f"{modules} are trained, as asked for", numbers=numbers)


def zero_rate(rates: Iterable[float]) -> Verdict:
    """The learning rate is not zero, as float32 has it, in every step; a first or last step of zero is usual."""
    moves = any(np.float32(rate) > 0 for rate in rates)
    words = "is above zero in a step" if moves else "is zero in every step of the run"
    return Verdict(
        code="zero_rate",
        passed=moves,
        message=f"the learning rate {words}",
        fix="" if moves else "raise --lr, or let --warmup be shorter than the run",
    )


def every_window_supervised(rows: TokenRows) -> Verdict:
    """Every row has a token that is trained on, and so has every window."""
    empty = int((rows.trained < 1).sum())
    message = f"{empty} of {len(rows)} rows hold no token that is trained on"
    return Verdict(
        code="every_window_supervised",
        passed=len(rows) > 0 and empty == 0,
        message=message if empty or not len(rows) else f"each of {len(rows)} rows holds tokens that are trained on",
        numbers={"rows": len(rows), "rows_without": empty, "least": int(rows.trained.min(initial=0))},
        fix="check the rows with `python -m mens_core data show`" if empty else "",
    )


def end_of_turn_supervised(rows: TokenRows, encoder: Encoder) -> Verdict:
    """The model is taught to end its turn, in a row at least; where rows are cut, some may have lost their end.

    Where the tokenizer has no token for the end of a turn, it is looked for in the text of what is trained on, in
    1000 rows at most.
    """
    stops = np.asarray(encoder.stop_tokens(), np.int32)
    tags = [tag for tag in encoder.chat.end_tags if encoder.tokenizer.token_to_id(tag) is None]
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _ROWS_READ)).astype(np.int64) if tags else slice(None)
    judged = rows[chosen] if isinstance(chosen, slice) else rows.take(chosen)
    ends = _rows_having(judged, lambda ids, supervised: supervised & np.isin(ids, stops), first=1)
    if tags:
        ends |= np.fromiter((_spells(row.input_ids[1:][row.supervised[1:]], encoder, tags) for row in judged), np.bool_)
    count = int(ends.sum())
    share = f"{count} of {len(judged)} rows{' that were read' if tags else ''}"
    return Verdict(
        code="end_of_turn_supervised",
        passed=count > 0,
        message=f"the end of a turn is trained on in {share}"
        + ("" if count else ", so that the model would not learn to stop"),
        numbers={"rows": len(judged), "rows_with_end": count, "share": count / max(1, len(judged))},
        fix="" if count else "raise --seq-len, or let --truncation-side be left, so that the ends are not cut off",
    )


def ids_in_vocabulary(rows: TokenRows, vocab_size: int) -> Verdict:
    """Every token has a row in the embedding."""
    bad = int(_rows_having(rows, lambda ids, _: (ids < 0) | (ids >= vocab_size)).sum())
    words = f"{bad} rows hold ids outside" if bad else "every id is inside"
    return Verdict(
        code="ids_in_vocabulary",
        passed=bad == 0,
        message=f"{words} the embedding's {vocab_size} rows",
        numbers={"rows_outside": bad, "vocab_size": vocab_size},
        fix="use the tokenizer that belongs to the model" if bad else "",
    )


def adapter_identity(start: TrainingState, held: TrainingState, *, new: bool) -> Verdict:
    """The session holds the start bit for bit, and a new adapter changes nothing, since every B is zero.

    Args:
        start: the adapter that was to be restored.
        held: what the session says it holds.
        new: whether the adapter is new, and not one that is trained further.
    """
    same = {name for name, tensor in start.adapter.items() if np.array_equal(tensor, held.adapter.get(name, ()))}
    other = len({*start.adapter, *held.adapter} - same)
    moved = sum(bool(tensor.any()) for name, tensor in held.adapter.items() if new and name.endswith(".lora_B.weight"))
    if other:
        message = f"{other} of the adapter's tensors are not what the session was given"
    elif moved:
        message = f"{moved} matrices B of the new adapter are not zero, so that it is not the identity"
    else:
        message = "the new adapter is the identity" if new else "the session holds the adapter that is trained further"
    return Verdict(
        code="adapter_identity",
        passed=not other and not moved,
        message=message,
        numbers={"tensors": len(start.adapter), "tensors_that_differ": other, "b_not_zero": moved},
        fix="report it to the backend's authors" if other or moved else "",
    )


def first_loss(loss: float | None, vocab_size: int, problem: str = "") -> Verdict:
    """The base's loss on the first window is a number; where it lies is told, and fails nothing.

    Args:
        loss: in nats a supervised token; None if the backend gave none.
        vocab_size: V; a model that knows nothing has a loss of ln V.
        problem: why there is none.
    """
    uniform = math.log(vocab_size)
    numbers = {"loss": loss if loss is not None and math.isfinite(loss) else None, "ln_vocabulary": uniform}
    if numbers["loss"] is None:
        message = f"the base's loss on the first window is no finite number: {problem or loss}"
        fix = "train with --dtype float32, or check the base"
        return Verdict(code="first_loss", passed=False, message=message, numbers=numbers, fix=fix)
    share = numbers["loss"] / uniform
    if share > 1 + _NEAR:
        where = "above what guessing gives, {}: is the tokenizer the base's?"
    elif share >= 1 - _NEAR:
        where = "near {}: the base is random"
    else:
        where = "far below {}: the base is trained" if share < _FAR else "below {}: the base knows a little"
    place = where.format(f"ln {vocab_size} = {uniform:.3f}")
    message = f"the base's loss on the first window is {numbers['loss']:.3f}, {place}"
    return Verdict(code="first_loss", passed=True, message=message, numbers=numbers)


def _rows_having(
    rows: TokenRows,
    holds: Callable[[NDArray[np.int32], NDArray[np.bool_]], NDArray[np.bool_]],
    first: int = 0,
) -> NDArray[np.bool_]:
    """(rows,) whether a row holds such a token, from its ``first`` on; reads the tables once, piece by piece."""
    having = np.zeros(len(rows), np.bool_)
    for place, part in rows.parts():
        found, end = [np.zeros(0, np.int64)], part.ends.max()
        for start in range(part.starts.min(), end, _AT_ONCE):
            piece = slice(start, min(start + _AT_ONCE, end))
            found.append(start + np.flatnonzero(holds(rows.input_ids[piece], rows.supervised[piece])))
        places = np.concatenate(found)
        having[place] = np.searchsorted(places, part.ends) > np.searchsorted(places, part.starts + first)
    return having


def _spells(trained: NDArray[np.int32], encoder: Encoder, tags: list[str]) -> bool:
    """Whether the text of what is trained on ends with a tag.

    A token stands for a byte at least, so that a tag lies in as many tokens as it has bytes, or fewer. It is looked for
    in the text, since its first token may begin in the answer.
    """
    longest = max(len(tag.encode()) for tag in tags)
    text = encoder.tokenizer.decode(trained[-longest - 4 :].tolist(), skip_special_tokens=False)
    return text.rstrip().endswith(tuple(tags))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(tuple(shape))
